// The sensitivity scan: a heat map with a row per group, a column per ratio, and a bar for the group as a whole.

/** Root of a mean value: what weighs the scores of a criterion. */
const influence = (group) => Math.sqrt(Math.max(0, group.values.reduce((sum, value) => sum + value, 0) / group.values.length));

/** 0 for none, 1 for the greatest of the chart, by fourth roots: values differ by orders of magnitude. */
const heat = (value, most) => (Math.max(0, value) / most) ** 0.25;

function sensitivityValue(measure, value) {
  if (measure === "accuracy") return `${(100 * value).toFixed(1)}\u202f%`;
  if (value < 0.001) return value < 1e-9 ? "0" : value.toExponential(0);
  return value >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(2)));
}

function sensitivityChart(scan, app) {
  const most = Math.max(1e-12, ...scan.groups.flatMap((group) => group.values));
  const longest = Math.max(1e-12, ...scan.groups.map(influence));
  const head = html("tr", {}, html("th", {}, "group"), ...scan.ratios.map((ratio) => html("th", { class: "n" }, percent(ratio))), html("th", { class: "bar" }, "influence"));
  const body = html("tbody");
  for (const group of scan.groups) body.append(sensitivityRow(scan, group, most, longest, app));
  return html("table", { class: "heat" }, html("thead", {}, head), body);
}

function sensitivityRow(scan, group, most, longest, app) {
  const name = group.id === null ? html("span", {}, breakable(group.name)) : html("button", { type: "button" }, breakable(group.name));
  const row = html("tr", { title: `${group.name}: ${group.channels} channels` }, html("td", {}, name));
  group.values.forEach((value, i) => {
    const cell = html("td", { class: "n cell", title: `${group.masked[i]} of ${group.channels} channels masked` }, sensitivityValue(scan.measure, value));
    cell.style.setProperty("--heat", heat(value, most).toFixed(3));
    row.append(cell);
  });
  const meter = html("div", { class: "meter" }, html("i"));
  meter.firstChild.style.width = `${(100 * influence(group)) / longest}%`;
  row.append(html("td", { class: "bar" }, meter));
  if (group.id !== null) {
    row.dataset.group = group.id;
    row.addEventListener("click", () => app.showGroup(group.id));
  }
  return row;
}

function sensitivitySection(scan, app) {
  const what = scan.measure === "kl" ? "KL to the original in nats" : `Accuracy lost of ${sensitivityValue("accuracy", scan.accuracy)}`;
  return [
    html("h3", {}, `Sensitivity, before ${scan.pass}`),
    html("p", { class: "sub" }, `${what} when that share of one group alone is masked, on ${scan.images} images. The bar is the root of the mean.`),
    sensitivityChart(scan, app),
  ];
}
