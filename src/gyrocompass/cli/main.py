"""The command line: verbs, their options, and how errors reach the user.

Nothing heavy is imported before a verb is chosen, so that `gyro --help` answers at once. Exit codes: 0 done,
1 failed (or interrupted), 2 the user's input is wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gyrocompass import __version__
from gyrocompass.core.errors import BadInput, GyroError, refused_by_disk

DESCRIPTION = "A language model's whole life on one signal: the log-probability of each token."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    # How long an idle thread of torch spins before it sleeps: decision 0008. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["lm-eval"]:  # all that follows is the harness's own, `--help` too
        options = argparse.Namespace(verb="lm-eval", arguments=given[1:])
    else:
        options = parser().parse_args(given)
    if options.verb is None:
        parser().print_help()
        return BadInput.exit_code
    try:
        verb: Callable[[argparse.Namespace], int] = _load(options.verb)
        return verb(options)
    except GyroError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        failure = refused_by_disk(error)
        if failure is None:
            raise
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_code


def _load(verb: str) -> Callable[[argparse.Namespace], int]:
    """The function behind a verb, importing its module only now."""
    from importlib import import_module

    module = import_module(f"gyrocompass.cli.{_MODULES.get(verb, verb)}")
    function: Callable[[argparse.Namespace], int] = getattr(module, verb.replace("-", "_"))
    return function


_MODULES = {
    "eval": "judge",
    "promote": "registry",
    "rollback": "registry",
    "audit": "registry",
    "card": "registry",
    "calibrate": "judge",
    "lm-eval": "lm_eval",
    "demo": "run",
    "train": "run",
    "report": "run",
}


def parser() -> argparse.ArgumentParser:
    """Every verb with its options."""
    gyro = argparse.ArgumentParser(prog="gyro", description=DESCRIPTION)
    gyro.add_argument("--version", action="version", version=f"gyro {__version__}")
    verbs = gyro.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    _add_demo(verbs)
    _add_run(verbs)
    _add_train(verbs)
    _add_score(verbs)
    _add_generate(verbs)
    _add_eval(verbs)
    _add_compare(verbs)
    _add_diff(verbs)
    _add_lm_eval(verbs)
    _add_serve(verbs)
    _add_policy(verbs)
    _add_keys(verbs)
    _add_feedback(verbs)
    _add_registry(verbs)
    _add_promote(verbs)
    _add_loop(verbs)
    _add_verify(verbs)
    _add_data(verbs)
    _add_lineage(verbs)
    _add_forget(verbs)
    _add_report(verbs)
    _add_doctor(verbs)
    return gyro


_Verbs = argparse._SubParsersAction  # argparse has no public name for it


def _add(verbs: _Verbs[argparse.ArgumentParser], name: str, sentence: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=sentence, description=sentence[0].upper() + sentence[1:] + ".")


def _add_demo(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "demo", "make a small code assistant from the standard library, start to finish")
    verb.add_argument(
        "--small", action="store_true", help="the same stages in about a minute, learning little"
    )
    _run_options(verb)


def _add_run(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "run", "run a recipe, stage by stage; finished stages are reused")
    verb.add_argument("recipe", help="a YAML file, or the name of a built-in recipe (stdlib)")
    _variant_option(verb)
    _run_options(verb)


def _add_train(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "train", "train a model in Hugging Face format on files, scored before and after")
    verb.add_argument("model", type=_path, help="a folder with config.json, safetensors and a tokenizer")
    verb.add_argument(
        "data", type=_path, nargs="+", help="text, JSONL or Parquet files, folders, or saved datasets"
    )
    verb.add_argument("--out", type=Path, help="also write the trained model here, in Hugging Face format")
    _run_options(verb)


def _add_score(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "score", "print the log-probability of texts under a model, per slice")
    verb.add_argument("model", help="a model folder, or an artifact id")
    verb.add_argument(
        "data", type=_path, nargs="+", help="text, JSONL or Parquet files, folders, or saved datasets"
    )
    verb.add_argument("--tokens", action="store_true", help="print every token with its log-probability too")
    verb.add_argument(
        "--length", type=_at_least(2), help="tokens looked back at (default: the context, at most 1024)"
    )
    verb.add_argument(
        "--stride", type=_at_least(1),
        help="long documents in windows that begin so many tokens apart (default: the length, no overlap)",
    )  # fmt: skip
    verb.add_argument("--precision", choices=("float64", "float32", "bf16"), default="float32")
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _store_options(verb)


def _add_generate(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "generate", "complete prompts, with the log-probability of each token")
    verb.add_argument("model", help="a model folder, or an artifact id")
    verb.add_argument("prompt", nargs="+")
    verb.add_argument("--chat", action="store_true", help="put each prompt as a user's turn")
    verb.add_argument("--max-new-tokens", type=_at_least(1), default=128)
    verb.add_argument("--temperature", type=_number(0.0), default=0.0, help="0 is greedy (default)")
    verb.add_argument("--top-p", type=_number(0.0, 1.0, above=True), default=1.0)
    verb.add_argument("--top-k", type=_at_least(1), help="draw from the likeliest so many")
    verb.add_argument(
        "--min-p", type=_number(0.0, 1.0, above=True), help="of the likeliest one's probability"
    )
    verb.add_argument("--typical-p", type=_number(0.0, 1.0, above=True))
    verb.add_argument("--repetition-penalty", type=_number(0.0, above=True), default=1.0)
    verb.add_argument("--frequency-penalty", type=float, default=0.0)
    verb.add_argument("--presence-penalty", type=float, default=0.0)
    verb.add_argument("--beams", type=_at_least(1), default=1, help="beam search")
    verb.add_argument("--stop", nargs="+", default=(), help="end before the first of these texts")
    verb.add_argument("--choices", nargs="+", help="write one of these texts")
    verb.add_argument("--regex", help="write a text that matches")
    verb.add_argument("--json-schema", type=_path, help="a file: write JSON that is valid by this schema")
    verb.add_argument(
        "--alternatives", type=_at_least(0), default=0, help="likeliest tokens told in each place"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--json", action="store_true", help="print JSON with tokens and log-probabilities")
    _store_options(verb)


def _add_eval(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    for name, sentence in (
        ("eval", "evaluate a model on tasks and held-out files, with intervals"),
        ("calibrate", "find out how far a model's confidence can be trusted, and make it better"),
    ):
        verb = _add(verbs, name, sentence)
        verb.add_argument("model", help="a model folder, an artifact id, or the URL of a server")
        verb.add_argument("--tasks", type=_path, nargs="+", default=[], help="YAML files of tasks")
        verb.add_argument(
            "--data", type=_path, nargs="+", default=[], help="files that the model was not trained on"
        )
        _set_option(verb)
        _store_options(verb)


def _add_compare(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "compare", "compare two recipes over some seeds, or two models on the same files")
    verb.add_argument("a", help="a recipe; with --data, a model folder or an artifact id")
    verb.add_argument("b", help="the same")
    verb.add_argument("--seeds", type=_at_least(1), default=3, help="of each recipe (default 3)")
    verb.add_argument("--data", type=_path, nargs="+", default=[], help="compare two models on these files")
    _variant_option(verb)
    _set_option(verb)
    _store_options(verb)


def _add_diff(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "diff", "say what differs between two data sets, recipes, models or other artifacts")
    verb.add_argument("a", help="an artifact id, NAME:VERSION, NAME@ALIAS; or a recipe")
    verb.add_argument("b", help="another of the same kind")
    verb.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _variant_option(verb)
    _store_options(verb)


def _add_lm_eval(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    _add(verbs, "lm-eval", "run lm-evaluation-harness, which then knows `--model gyro`")


def _add_serve(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "serve", "answer over HTTP as OpenAI does, with confidence, behind a gate")
    verb.add_argument("model", nargs="?", help="a model folder, or an artifact id")
    verb.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    verb.add_argument("--port", type=_at_least(1), default=8000)
    verb.add_argument("--name", help="what clients call the model (default: its id, or its folder's name)")
    verb.add_argument(
        "--engine", choices=("embedded", "ctranslate2"), default="embedded",
        help="what writes answers (ctranslate2: an extra, for CPUs; no constraints, seeds or penalties)",
    )  # fmt: skip
    verb.add_argument(
        "--precision", choices=("float32", "bfloat16", "int8"),
        help="of weights (default: as saved; int8: of ctranslate2, approximate)",
    )  # fmt: skip
    verb.add_argument("--upstream", metavar="URL", help="put the gate before this server instead")
    verb.add_argument("--upstream-model", metavar="NAME", help="the model's name there")
    verb.add_argument("--upstream-key-env", metavar="VARIABLE", help="the variable that holds its key")
    verb.add_argument("--stronger", metavar="URL", help="a server for what the gate escalates")
    verb.add_argument("--stronger-model", metavar="NAME", help="the model's name there")
    verb.add_argument("--stronger-key-env", metavar="VARIABLE", help="the variable that holds its key")
    verb.add_argument("--policy", type=_path, help="a YAML file: what becomes of questions and answers")
    verb.add_argument(
        "--keep-texts", choices=("none", "masked", "full"), default="none", help="of events (default: none)"
    )
    verb.add_argument("--keep-days", type=_number(0.0, above=True), default=30.0, help="of events (30)")
    verb.add_argument("--traces", type=Path, metavar="FILE", help="write OpenTelemetry spans here, as JSON")
    verb.add_argument("--max-tokens", type=_at_least(1), default=4096, help="of one answer, at most")
    verb.add_argument("--max-body-bytes", type=_at_least(1024), default=4 * 2**20, help="of one request")
    verb.add_argument("--deadline-s", type=_number(0.0, above=True), help="of one request, seconds")
    verb.add_argument("--most-rows", type=_at_least(1), default=32, help="answers written at once")
    verb.add_argument("--most-waiting", type=_at_least(1), default=256, help="requests that may wait")
    _store_options(verb)


def _add_policy(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "policy", "check a gate's policy, keep it, or try it on what was asked before")
    actions = verb.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    check = _add(actions, "check", "say whether a policy file is one, and what it does")
    save = _add(actions, "save", "keep a policy in the store, as an artifact")
    dry_run = _add(actions, "dry-run", "say what a policy would have done to logged traffic")
    dry_run.add_argument("--days", type=_number(0.0, above=True), default=7.0, help="looked back (default 7)")
    dry_run.add_argument("--events", type=_path, help="JSON lines of events, instead of the store's")
    dry_run.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for one in (check, save, dry_run):
        one.add_argument("file", type=_path, help="a YAML file")
        _store_options(one)


def _add_keys(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "keys", "make, list and revoke the keys of a server")
    actions = verb.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    create = _add(actions, "create", "make a key and show it, this once")
    create.add_argument("name", help="of who gets it")
    create.add_argument(
        "--scopes", nargs="+", choices=("infer", "review", "admin"), default=["infer"],
        help="ask, decide on answers, everything (default: infer)",
    )  # fmt: skip
    create.add_argument("--tier", default="", help="what policies call its holder")
    create.add_argument("--requests-per-minute", type=_number(0.0, above=True), help="at most")
    list_ = _add(actions, "list", "show all keys, without their secrets")
    list_.add_argument("--json", action="store_true", help="print JSON instead of a table")
    revoke = _add(actions, "revoke", "make a key useless")
    revoke.add_argument("id", help="its 12 characters in the list")
    for one in (create, list_, revoke):
        _store_options(one)


def _add_feedback(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "feedback", "make training data of what people decided")
    actions = verb.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    export = _add(actions, "export", "write what was decided as an artifact of JSON lines")
    export.add_argument("--days", type=_number(0.0, above=True), help="only of the last so many")
    export.add_argument("--all-texts", action="store_true", help="also of users who did not agree")
    export.add_argument("--out", type=_path, help="copy the files here too")
    export.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _store_options(export)


def _add_registry(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "registry", "give artifacts names and versions, and see which is which")
    actions = verb.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    add = _add(actions, "add", "a new version of a name")
    add.add_argument("name")
    add.add_argument("artifact", help="its id, or the unique beginning of one")
    add.add_argument(
        "--policy", metavar="ARTIFACT", help="of a model: the policy that moves with it (gyro policy save)"
    )
    list_ = _add(actions, "list", "all versions with their aliases")
    list_.add_argument("name", nargs="?")
    list_.add_argument("--json", action="store_true", help="print JSON instead of a table")
    alias = _add(actions, "alias", "let an alias mean a version, such as challenger or shadow")
    alias.add_argument("name")
    alias.add_argument("alias")
    alias.add_argument("version", type=_at_least(1))
    mirror = _add(actions, "mirror", "show all names, versions and aliases in MLflow's registry too")
    mirror.add_argument("--uri", help="of MLflow's store (default: mlflow.db in the store)")
    for one in (add, list_, alias, mirror):
        _who_option(one)
        _store_options(one)
    card = _add(verbs, "card", "a model's card: what it learned from, what was measured, what was not")
    card.add_argument("model", help="an artifact, NAME:VERSION or NAME@ALIAS")
    card.add_argument("--intended-use", type=_path, help="a Markdown file by those who answer for the model")
    card.add_argument("--out", type=_path, help="write it here, say as README.md beside the weights")
    _store_options(card)
    audit = _add(verbs, "audit", "check that what administrators did was not changed since")
    _store_options(audit)


def _add_promote(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "promote", "make a version champion, if a rule holds; keep the proof")
    verb.add_argument("name")
    verb.add_argument("version", type=_at_least(1))
    verb.add_argument("--rule", type=_path, required=True, help="a YAML file: what has to hold")
    verb.add_argument("--approve", nargs="+", default=[], metavar="NAME", help="who says yes")
    verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
    back = _add(verbs, "rollback", "make the champion before this one champion again")
    back.add_argument("name")
    for one in (verb, back):
        _who_option(one)
        _store_options(one)
    trial = _add(verbs, "rollout", "try a version on users beside the champion, and see what comes of it")
    actions = trial.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    start = _add(actions, "start", "begin; the servers of the name follow")
    start.add_argument("name")
    start.add_argument("version", type=_at_least(1))
    start.add_argument("--plan", type=_path, required=True, help="a YAML file: mode, share, guardrails")
    status = _add(actions, "status", "what is known of each guardrail")
    status.add_argument("name")
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    stop = _add(actions, "stop", "end it; its users go back to the champion")
    stop.add_argument("name")
    stop.add_argument("--why", default="", help="a remark for the history")
    for one in (start, status, stop):
        _who_option(one)
        _store_options(one)


def _add_loop(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "loop", "learn from what people decide: a challenger, judged, tried, kept or not")
    verb.add_argument("file", type=_path, help="a YAML file: recipe, rule, rollout, trigger")
    verb.add_argument(
        "--once", action="store_true", help="as far as it goes without waiting, instead of until interrupted"
    )
    verb.add_argument("--give-up", action="store_true", help="end the open cycle first, at any step")
    verb.add_argument("--status", action="store_true", help="tell what became of the cycles so far, and stop")
    verb.add_argument("--json", action="store_true", help="with --status: JSON instead of a table")
    _store_options(verb)


def _who_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--by", default=os.environ.get("USER", "somebody"), help="who does it (default: $USER)")


def _add_verify(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "verify", "prove a recipe on its own first batches before its first hour")
    verb.add_argument("recipe", help="a YAML file, or the name of a built-in recipe (stdlib)")
    _variant_option(verb)
    _set_option(verb)
    _store_options(verb)


def _add_lineage(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "lineage", "walk from an artifact to its documents, or from a document to what saw it")
    verb.add_argument(
        "id", nargs="?", help="an artifact or document id (a unique beginning will do), or a document's path"
    )
    verb.add_argument(
        "--token",
        nargs=3,
        metavar=("MODEL", "STEP", "POSITION"),
        help="the document and its bytes that a model read at a position of a training step",
    )
    _store_options(verb)


def _add_data(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "data", "build data sets from raw files, and say why what is in them is in them")
    actions = verb.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    build = _add(actions, "build", "build a data set; what is finished is found again")
    build.add_argument("file", type=_path, help="a YAML file with sources, steps and rules")
    build.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _worker_options(build)
    _store_options(build)
    inspect = _add(actions, "inspect", "show what is in a data set and what is not, and write an HTML report")
    inspect.add_argument(
        "dataset", nargs="?", help="an artifact id, a folder, or a build's name (default: the last one built)"
    )
    inspect.add_argument(
        "--samples", type=_at_least(0), default=8, help="documents shown in part (default: 8)"
    )
    inspect.add_argument(
        "--reveal", action="store_true", help="show what is personal or secret in samples too"
    )
    inspect.add_argument("--out", type=_path, help="where the report goes (default: reports/ in the store)")
    _store_options(inspect)
    why = _add(actions, "why", "say why a document is in a data set, or is not")
    why.add_argument("document", help="its id (a unique beginning will do) or its path (or the end of it)")
    why.add_argument(
        "--dataset", help="an artifact id, a folder, or a build's name (default: the last one built)"
    )
    why.add_argument("--json", action="store_true", help="print JSON instead of text")
    _store_options(why)
    diff = _add(actions, "diff", "say what differs between two data sets, by document and by slice")
    diff.add_argument("before", help="an artifact id, a folder, or a build's name")
    diff.add_argument("after", help="another")
    diff.add_argument(
        "--rows", type=_at_least(0), default=20, help="documents shown of each kind (default: 20)"
    )
    diff.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _store_options(diff)
    export = _add(
        actions, "export", "write a data set's card, Croissant metadata, training summary or attribution"
    )
    export.add_argument(
        "dataset", nargs="?", help="an artifact id, a folder, or a build's name (default: the last one built)"
    )
    export.add_argument(
        "--format",
        choices=("card", "croissant", "eu-summary", "attribution"),
        default="card",
        help="Markdown, JSON-LD, the summary of training content that the EU asks for, or licences and their "
        "holders (default: card)",
    )
    export.add_argument(
        "--slices", nargs="+", default=[], help="attribution: of these alone, as a mixture reads them"
    )
    export.add_argument("--url", help="where the data set is to be found, for Croissant")
    export.add_argument("--out", type=_path, help="a file (default: standard output)")
    _store_options(export)


def _add_forget(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "forget", "take a document, or a user, out of all stored data and of later versions")
    verb.add_argument(
        "document",
        help="its id (a unique beginning will do) or its path (or the end of it); with --user, a user's name",
    )
    verb.add_argument("--user", action="store_true", help="forget a user, by the name that requests gave")
    verb.add_argument("--reason", default="", help="a remark for the opt-out list")
    verb.add_argument(
        "--canaries", type=_path, help="JSONL: context and canary; how far models know them is told and kept"
    )
    verb.add_argument("--dry-run", action="store_true", help="show what saw it and what would go, and stop")
    _who_option(verb)
    _worker_options(verb)
    _store_options(verb)
    exposure = _add(verbs, "exposure", "how far models recite what stood in their data, before and after")
    exposure.add_argument("models", nargs="+", help="folders, ids, NAME:VERSION or NAME@ALIAS")
    exposure.add_argument("--canaries", type=_path, required=True, help="JSONL: context and canary")
    exposure.add_argument("--candidates", type=_at_least(2), default=256, help="texts ranked (default 256)")
    exposure.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _store_options(exposure)


def _worker_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--workers", type=_at_least(1), help="processes (default: one for each CPU)")
    verb.add_argument(
        "--ray", action="store_true", help="work on a Ray cluster (RAY_ADDRESS, or a local one)"
    )


def _add_report(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "report", "print the table of a finished run and write its HTML report again")
    verb.add_argument("recipe", nargs="?", help="the run of this recipe; the newest run where not given")
    _store_options(verb)


def _add_doctor(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    verb = _add(verbs, "doctor", "say what works on this machine, what does not, and what to do about it")
    verb.add_argument(
        "url", nargs="?", help="of an OpenAI-compatible server: look for what ruins likelihoods"
    )
    verb.add_argument("--model", help="the model's name at the server (default: its first)")
    verb.add_argument("--key-env", metavar="VARIABLE", help="the variable that holds the server's key")
    verb.add_argument("--json", action="store_true", help="print JSON instead of text")
    _store_options(verb)


def _path(text: str) -> Path:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"the name {text!a} is not UTF-8: rename it") from error
    return Path(text)


def _at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up")
        return int(text)

    return whole_number


def _number(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A finite number from `least` (or `above` it) to `most`."""
    span = f"{'above' if above else 'from'} {least:g}" + (f" to {most:g}" if most < math.inf else " up")

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {span}")
        return value

    return number


def _run_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--dry-run", action="store_true", help="show the stages and which are cached, and stop")
    _set_option(verb)
    _store_options(verb)


def _variant_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--variant", help="one of the recipe's own named sets of overrides, such as small")


def _set_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one value of the recipe (repeatable), such as stages.pretrained.steps=50",
    )


def _store_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--store",
        type=Path,
        default=Path(os.environ.get("GYRO_STORE", "gyro-store")),
        help="where artifacts live (default: $GYRO_STORE, or ./gyro-store)",
    )
    verb.add_argument(
        "--store-url",
        default=os.environ.get("GYRO_STORE_URL"),
        help="database of the store, postgresql://... (default: $GYRO_STORE_URL, or SQLite in the store)",
    )
