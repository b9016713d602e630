// Tables whose columns sort, and whose rows can be narrowed.
"use strict";
const byId = id => document.getElementById(id);
const make = (tag, text, attributes = {}) => {
  const element = document.createElement(tag);
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};
const sortable = (table, sort) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    const button = make("button", null, { type: "button" });
    button.append(head.firstChild);
    head.prepend(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(h => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(at, down, head.classList.contains("text"));
    });
  });
};
const ordered = (a, b, down) => {
  const none = v => v === null || Number.isNaN(v);
  if (none(a) || none(b)) return none(a) ? none(b) ? 0 : 1 : -1;
  const step = typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  return down ? -step : step;
};
for (const table of document.querySelectorAll("table.sortable")) {
  sortable(table, (at, down, text) => {
    const of = row => { const cell = row.cells[at].textContent.trim(); return text ? cell : parseFloat(cell.replace("−", "-").replace(/^[^\d-]+/, "")); };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => ordered(of(a), of(b), down)));
  });
}
for (const field of document.querySelectorAll("input.narrow")) {
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of byId(field.dataset.table).tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

