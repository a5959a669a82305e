"""Raw files of any kind become documents: archives, web pages, code trees, conversations, tables, text.

    file --unpack--> Blob, Blob, ...            (archives, streams)
    Blob --read_blob--> Document | Quarantined | Skipped        (read, texts, chatlogs, warc, pages)

Each document knows the sha256 of its bytes and of their file, the time that its source states, what says
something about its licence, and what of its text was repaired. What is damaged, hostile or too large is
quarantined with its file, its offset and the reason, and reading goes on with the next; `on_damage: refuse`
stops instead.

Nothing is unpacked to the disk by its own name, no link is followed, nothing in a file is run.
"""
