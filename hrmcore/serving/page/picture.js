// The lens as a picture: a river that runs down through the layers of every visit. Across it lie the probabilities of
// the next token; the answer's own stream is on the left. Plain SVG, its colours written out, so that it can be saved.

const LIGHT = {
  back: "#fbfaf8", text: "#1d1d1b", dim: "#5d5a55", line: "#d8d4cc", bed: "#efece6", slow: "#e3dfd6",
  answer: "#9c3f00", onAnswer: "#ffffff", others: ["#a9c3dc", "#b8d4ae", "#dcc4e4", "#e8d79b"], onOthers: "#1d1d1b",
};
const DARK = {
  back: "#161615", text: "#eceae4", dim: "#aaa69d", line: "#3b3935", bed: "#222120", slow: "#2e2c29",
  answer: "#f0a04b", onAnswer: "#1d1d1b", others: ["#37536e", "#3d5a36", "#5a4468", "#625622"], onOthers: "#f4f2ec",
};
const NS = "http://www.w3.org/2000/svg";
const SANS = "system-ui, sans-serif", MONO = "ui-monospace, monospace";
const HEAD = 88, LEFT = 48;

function make(name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export function cut(text, most, fromEnd = false) {
  const letters = [...text];
  if (letters.length <= most) return text;
  return fromEnd ? "…" + letters.slice(1 - most).join("") : letters.slice(0, most - 1).join("") + "…";
}

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)}%`;

// The visits in order: name, stack, first and last step.
export function visits(steps) {
  const found = [];
  steps.forEach((step, index) => {
    if (found.at(-1)?.name !== step.visit) found.push({ name: step.visit, stack: step.stack, first: index });
    found.at(-1).last = index;
  });
  return found;
}

// From which visit on every visit ends in the answer, of which at most so many letters are said.
export function standing(report, most = Infinity) {
  const all = visits(report.steps), leads = (visit) => report.steps[visit.last].token === report.answer.token;
  const other = all.findLastIndex((visit) => !leads(visit)), answer = cut(report.answer.text, most);
  if (other === all.length - 1) return `“${answer}” was not the likeliest`;
  return `“${answer}” leads from ${all[other + 1].name} on`;
}

// A text in lines of at most so many letters, as far as its words allow.
function wrapped(text, most) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= most) lines.push(word);
    else lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines;
}

// The edges of a stream, as a closed path: smooth between the steps, straight beyond the first and the last.
function stream(left, right, y, top, bottom) {
  const down = left.map((x, i) => (i ? `C${left[i - 1]},${mid(y, i)} ${x},${mid(y, i)} ${x},${y[i]}` : ""));
  const up = right.map((x, i) => (i < right.length - 1
    ? `C${right[i + 1]},${mid(y, i + 1)} ${x},${mid(y, i + 1)} ${x},${y[i]}` : "")).reverse();
  return `M${left[0]},${top}L${left[0]},${y[0]}${down.join("")}L${left.at(-1)},${bottom}` +
    `L${right.at(-1)},${bottom}L${right.at(-1)},${y.at(-1)}${up.join("")}L${right[0]},${top}Z`;
}
const mid = (y, i) => ((y[i - 1] + y[i]) / 2).toFixed(1);

// The picture of a report of /v1/lens. `asked` is the question; `width` in pixels.
export function draw(report, asked, width, dark) {
  const colour = dark ? DARK : LIGHT, steps = report.steps, rounds = visits(steps);
  const right = Math.max(92, Math.min(150, width * 0.24)), x0 = LEFT, x1 = width - right;
  const deepest = Math.max(...rounds.map((visit) => visit.last - visit.first + 1));
  const dy = Math.max(20 / deepest, Math.min(18, 560 / steps.length));
  const y = steps.map((_, i) => HEAD + (i + 0.5) * dy), bottom = HEAD + steps.length * dy;
  const about = wrapped("Across: the probability of each next token, read after every layer. Down: fast L steps and " +
    `slow H steps. ${report.model}, hrmcore`, Math.floor((width - 20) / 5.6));
  const height = bottom + 24 + 15 * about.length;
  const svg = make("svg", { xmlns: NS, width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const told = `How the answer formed: ${standing(report)}, at ${percent(report.answer.probabilities.at(-1))} in the end`;
  svg.setAttribute("aria-label", told);
  const label = (text, x, at, fill, on, more = {}) =>
    svg.append(make("text", { x, y: at, fill, "data-on": on, "font-family": SANS, "font-size": 12, ...more }, text));

  svg.append(make("rect", { width, height, fill: colour.back }));
  const title = standing(report, 16), size = Math.min(17, (width - 24) / (0.7 * title.length));  // wide letters, too
  label(title, 12, 28, colour.text, colour.back, { "font-size": size.toFixed(1), "font-weight": 700 });
  label(cut(asked.replace(/\s+/g, " "), Math.floor((width - 24) / 7)), 12, 48, colour.dim, colour.back);
  const before = report.tokens.slice(0, report.token).join(""), room = Math.floor((width - 24) / 8) - 12;
  const said = make("text", { x: 12, y: 70, "font-family": MONO, "font-size": 13, fill: colour.dim, "data-on": colour.back });
  said.append(make("tspan", {}, cut(before, room, true)));
  said.append(make("tspan", { fill: colour.answer, "font-weight": 700 }, cut(report.answer.text, 16)));
  svg.append(said);

  svg.append(make("rect", { x: x0, y: HEAD, width: x1 - x0, height: bottom - HEAD, fill: colour.bed }));
  for (const visit of rounds.filter((one) => one.stack === "H")) {
    const tall = (visit.last - visit.first + 1) * dy;
    svg.append(make("rect", { x: 0, y: HEAD + visit.first * dy, width, height: tall, fill: colour.slow }));
  }
  const streams = [report.answer, ...report.contenders];
  const edges = [steps.map(() => x0)];
  for (const one of streams) {
    edges.push(edges.at(-1).map((x, i) => +(x + one.probabilities[i] * (x1 - x0)).toFixed(1)));
  }
  streams.forEach((one, k) => {
    const fill = k ? colour.others[k - 1] : colour.answer;
    const path = make("path", { d: stream(edges[k], edges[k + 1], y, HEAD, bottom), fill });
    path.append(make("title", {}, `${one.text}: ${percent(one.probabilities.at(-1))} in the end`));
    svg.append(path);
  });
  for (const visit of rounds) {
    const heavy = visit.stack === "H", at = HEAD + (visit.last + 1) * dy;
    svg.append(make("line", { x1: 0, x2: width, y1: at, y2: at, stroke: colour.line, "stroke-width": heavy ? 1.5 : 0.75 }));
  }
  streams.forEach((one, k) => nameStream(svg, one, k, edges, y, dy, colour));
  for (const visit of rounds) {
    const step = steps[visit.last], leads = step.token === report.answer.token, heavy = visit.stack === "H";
    const at = HEAD + ((visit.first + visit.last + 1) / 2) * dy + 4.5, on = heavy ? colour.slow : colour.back;
    const weight = heavy ? 700 : 400;
    label(visit.name, 8, at, heavy ? colour.text : colour.dim, on, { "font-weight": weight });
    const shown = `${cut(step.text, Math.floor((right - 52) / 7.5))}`;
    label(shown, x1 + 8, at, leads ? colour.answer : colour.text, on, { "font-family": MONO, "font-weight": leads ? 700 : 400 });
    label(percent(step.probability), width - 6, at, colour.dim, on, { "text-anchor": "end", "font-size": 11 });
  }
  about.forEach((line, i) => label(line, 12, bottom + 22 + 15 * i, colour.dim, colour.back, { "font-size": 10.5 }));
  return svg;
}

// A stream's name, where it is widest, if it is wide and tall enough there.
function nameStream(svg, one, k, edges, y, dy, colour) {
  const most = Math.max(...one.probabilities);
  const begin = one.probabilities.findIndex((share) => share >= 0.9 * most);
  let end = begin;
  while (one.probabilities[end + 1] >= 0.9 * most) end++;
  const at = Math.floor((begin + end) / 2);
  const size = k ? 12 : 15, letters = cut(one.text, 12), wide = edges[k + 1][at] - edges[k][at];
  if (wide < letters.length * size * 0.62 + 6) return;
  let tall = 0;
  for (const share of one.probabilities) if (share >= 0.6 * most) tall += dy;
  if (tall < size) return;
  const fill = k ? colour.onOthers : colour.onAnswer, on = k ? colour.others[k - 1] : colour.answer;
  svg.append(make("text", {
    x: ((edges[k][at] + edges[k + 1][at]) / 2).toFixed(1), y: (y[at] + size * 0.35).toFixed(1), fill, "data-on": on,
    "text-anchor": "middle", "font-family": MONO, "font-size": size, "font-weight": 700,
  }, letters));
}

const text = (svg) => new XMLSerializer().serializeToString(svg);

function download(url, name) {
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
}

export function saveSvg(svg, name) {
  const url = URL.createObjectURL(new Blob([text(svg)], { type: "image/svg+xml" }));
  download(url, `${name}.svg`);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

// The picture as PNG, `scale` pixels for each of its own.
export async function png(svg, scale = 3) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text(svg))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = svg.width.baseVal.value * scale;
  canvas.height = svg.height.baseVal.value * scale;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

export async function savePng(svg, name) {
  const url = URL.createObjectURL(await png(svg));
  download(url, `${name}.png`);
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
