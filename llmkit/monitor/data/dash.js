// Fetches the board every two seconds; the server has escaped what is in it, and the page allows no other script.
"use strict";
const board = document.querySelector("main");
const note = document.getElementById("note");
const said = document.getElementById("said");
const form = document.getElementById("key");
const held = "llmkit-dash-key";
const wait = 2000;
let last = "the start";

async function look() {
  const key = sessionStorage.getItem(held);
  try {
    const got = await fetch("board", { headers: key ? { authorization: `Bearer ${key}` } : {}, cache: "no-store" });
    if (got.status === 401 || got.status === 403) {
      form.hidden = false;
      board.hidden = true;
      note.textContent = key ? "This key does not open the page: it needs the scope admin." : "";
      return;
    }
    if (!got.ok) throw new Error(`the server answered ${got.status}`);
    const open = new Set([...board.querySelectorAll("details[open]")].map((d) => d.id));
    board.innerHTML = await got.text();
    for (const d of board.querySelectorAll("details")) if (open.has(d.id)) d.open = true;
    form.hidden = true;
    board.hidden = false;
    const line = board.querySelector(".headline");
    if (line && said.textContent !== line.textContent) said.textContent = line.textContent;
    last = board.querySelector("#now time").textContent; // the clock of the service, not that of the phone
    note.textContent = "";
    note.classList.remove("fail");
  } catch (e) {
    note.textContent = `No news since ${last}: ${e.message}. What is shown may be old.`;
    note.classList.add("fail");
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(held, form.elements.key.value.trim());
  form.elements.key.value = "";
  look();
});
setInterval(() => document.hidden || look(), wait);
document.addEventListener("visibilitychange", () => document.hidden || look());
look();
