// Filters what is listed: the rows by four selects, a list of what changed by its last two columns; without it all of
// them are there to read. A link to a row opens it.
"use strict";
const form = document.getElementById("filters");
if (form) {
  const cases = [...document.querySelectorAll("#cases > details")];
  const told = document.getElementById("shown");
  const filter = () => {
    const { why, subset, judge, outcome } = form.elements;
    let shown = 0;
    for (const one of cases) {
      const said = one.dataset.said.split(" ");
      const ofJudge = judge.value ? [said[judge.value]] : said;
      const fits =
        (!why.value || one.dataset.why.split(" ").includes(why.value)) &&
        (!subset.value || one.dataset.subset === subset.value) &&
        (!outcome.value || ofJudge.includes(outcome.value));
      one.hidden = !fits;
      shown += fits;
    }
    told.textContent = `${shown} of ${cases.length} rows shown`;
  };
  form.hidden = false;
  form.addEventListener("change", filter);
  filter();
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#case-"]');
    if (!link) return;
    form.reset();
    filter();
    document.querySelector(link.hash).open = true;
  });
}
for (const list of document.querySelectorAll("details.list")) {
  const kinds = new Map();
  for (const row of list.querySelectorAll("tbody tr")) {
    const kind = [...row.cells].slice(-2).map((cell) => cell.textContent).join(" → ");
    kinds.set(kind, [...(kinds.get(kind) ?? []), row]);
  }
  const label = document.createElement("label");
  const select = label.appendChild(document.createElement("select"));
  label.prepend("Show ");
  select.append(new Option("all", ""));
  for (const [kind, rows] of kinds) select.append(new Option(`${kind} (${rows.length})`, kind));
  select.addEventListener("change", () => {
    for (const [kind, rows] of kinds) for (const row of rows) row.hidden = select.value !== "" && select.value !== kind;
  });
  list.querySelector("summary").after(label);
}
