// Filters the rows that are shown by the four selects; without it all of them are there to read.
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
}
