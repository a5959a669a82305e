// Keyboard shortcuts, and the time that a claim has left. Pages work without this file.
"use strict";

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select");
  if (typing && event.key === "Escape") typing.blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "j" || event.key === "k") {
    const links = [...document.querySelectorAll(".items a")];
    const next = links.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1);
    links[Math.max(0, Math.min(links.length - 1, next))]?.focus();
    return;
  }
  if (event.key === "e" && document.activeElement?.id !== "text") {
    const text = document.getElementById("text");
    if (text && text.value === text.defaultValue) {
      event.preventDefault();
      text.focus();
      return;
    }
  }
  const button = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (button) {
    event.preventDefault();
    button.click();
  }
});

function showLeases() {
  for (const lease of document.querySelectorAll(".lease")) {
    const left = Math.round(Number(lease.dataset.until) - Date.now() / 1000);
    lease.textContent = left > 0 ? `yours for ${Math.floor(left / 60)} min ${left % 60} s` : "the claim has run out";
  }
}
setInterval(showLeases, 1000);
showLeases();
