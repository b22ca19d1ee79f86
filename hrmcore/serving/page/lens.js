// The lens under an answer: its tokens to choose from, and how the chosen one formed, as a picture and as a table.
import { draw, savePng, saveSvg, standing, visits } from "./picture.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
let panels = 0;

export function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function button(text, act) {
  const made = element("button", text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// The button that opens and closes the lens on an answer. `asked` is what the answer was asked with: {messages,
// condition}, `answer` its token ids, `headers` gives those of a request.
export function lensButton(article, asked, answer, headers) {
  const toggle = button("Look inside", () => {
    const open = toggle.getAttribute("aria-expanded") !== "true";
    toggle.setAttribute("aria-expanded", open);
    panel ??= new Panel(article, asked, answer, headers);
    panel.show(open);
    toggle.textContent = open ? "Close the lens" : "Look inside";
  });
  toggle.className = "look";
  toggle.setAttribute("aria-expanded", "false");
  let panel = null;
  return toggle;
}

class Panel {
  constructor(article, asked, answer, headers) {
    Object.assign(this, { asked, answer, headers, reports: new Map(), running: null, chosen: 0 });
    this.section = element("section", undefined, "lens");
    this.section.setAttribute("aria-label", "How the answer formed");
    this.tokens = element("div", undefined, "tokens");
    this.tokens.setAttribute("role", "radiogroup");
    this.tokens.setAttribute("aria-label", "Token of the answer");
    this.state = element("p", "", "state");
    this.state.setAttribute("role", "status");
    this.figure = element("figure");
    this.saving = element("div", undefined, "saving");
    this.saving.append(
      button("Save PNG", () => savePng(this.svg, "lens")),
      button("Save SVG", () => saveSvg(this.svg, "lens")),
    );
    this.table = element("details");
    this.section.append(this.tokens, this.state, this.figure, this.saving, this.table);
    this.saving.hidden = this.table.hidden = true;
    article.append(this.section);
    this.tokens.addEventListener("keydown", (event) => this.key(event));
    dark.addEventListener("change", () => this.paint());
    new ResizeObserver(() => this.paint()).observe(this.section);
    this.number = ++panels;
  }

  show(open) {
    this.section.hidden = !open;
    if (open) this.choose(this.chosen);
    else this.running?.abort();
  }

  key(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const places = { Home: 0, End: this.tokens.children.length - 1 };
    const count = this.tokens.children.length;
    if (!(event.key in steps) && !(event.key in places)) return;
    event.preventDefault();
    this.choose(places[event.key] ?? (this.chosen + steps[event.key] + count) % count);
    this.tokens.children[this.chosen].focus();
  }

  // Look at a token of the answer, counted from 0; the one after its last is what would follow.
  async choose(token) {
    this.chosen = token;
    [...this.tokens.children].forEach((one, index) => this.mark(one, index));
    this.running?.abort();
    const running = (this.running = new AbortController());
    try {
      if (!this.reports.has(token)) {
        this.state.textContent = "Looking …";
        this.reports.set(token, await this.fetch(token, running.signal));
      }
      if (this.running !== running) return;
      this.state.textContent = "";
      this.name();
      this.paint();
    } catch (error) {
      if (error.name !== "AbortError") this.state.textContent = error.message;
    }
  }

  async fetch(token, signal) {
    const body = JSON.stringify({ ...this.asked, answer: this.answer, token });
    const response = await fetch("v1/lens", { method: "POST", headers: this.headers(), body, signal });
    const content = await response.json();
    if (!response.ok) throw new Error(content.error.message);
    return content;
  }

  // The tokens to choose from, once their names are known.
  name() {
    if (this.tokens.children.length) return;
    const names = [...this.reports.get(this.chosen).tokens, "next"];
    this.tokens.append(...names.map((name, index) => {
      const one = button(name, () => this.choose(index));
      one.setAttribute("role", "radio");
      this.mark(one, index);
      return one;
    }));
  }

  mark(one, index) {
    one.setAttribute("aria-checked", index === this.chosen);
    one.tabIndex = index === this.chosen ? 0 : -1;
  }

  paint() {
    const report = this.reports.get(this.chosen), width = Math.min(720, this.section.clientWidth);
    if (!report || !width) return;
    const drawn = `${this.chosen} ${width} ${dark.matches}`;
    if (this.drawn === drawn) return;
    this.drawn = drawn;
    this.svg = draw(report, this.asked.messages.at(-1).content, width, dark.matches);
    this.figure.replaceChildren(this.svg, element("figcaption", `${standing(report)}.`, "hidden"));
    this.tabulate(report);
    this.saving.hidden = this.table.hidden = false;
  }

  tabulate(report) {
    const head = element("tr"), body = element("tbody");
    for (const name of ["Visit", "Likeliest", "Probability", `Of ${report.answer.text}`, "KL, nats"]) {
      const cell = element("th", name);
      cell.scope = "col";
      head.append(cell);
    }
    for (const visit of visits(report.steps)) {
      const step = report.steps[visit.last], row = element("tr"), name = element("th", visit.name);
      name.scope = "row";
      const shares = [step.probability, report.answer.probabilities[visit.last]].map((p) => `${(100 * p).toFixed(1)}%`);
      row.append(name, ...[step.text, ...shares, step.kl.toFixed(3)].map((text) => element("td", text)));
      body.append(row);
    }
    const table = element("table"), top = element("thead");
    top.append(head);
    table.append(top, body);
    this.table.replaceChildren(element("summary", "As a table"), table);
  }
}
