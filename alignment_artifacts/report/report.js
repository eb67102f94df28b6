"use strict";

const page = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SIDES = ["natural", "artifact"];

function element(name, className, text) { // text always goes in as text, never as markup
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Figures

function textColour() {
  return { "font.color": getComputedStyle(document.body).color };
}

// Only buttons that do not lead away from this page.
const CONFIG = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

for (const place of document.querySelectorAll(".plot")) {
  const { data, layout } = page.figures[place.dataset.figure];
  let height = layout.height;
  if (innerWidth < 640) { // a phone: the legend takes one row per entry, and numbers do not fit into cells
    height += 14 * data.filter((trace) => trace.showlegend !== false && trace.name).length;
    for (const trace of data) if (trace.type === "heatmap") trace.texttemplate = "";
  }
  place.style.height = `${height}px`;
  const modebar = { bgcolor: "rgba(0, 0, 0, 0)", color: "#999", activecolor: "#0072B2" };
  const onPage = { ...layout, height: undefined, title: undefined, sliders: [], modebar }; // the page has these itself
  onPage.font = { ...layout.font, color: textColour()["font.color"] };
  Plotly.newPlot(place, { data, layout: onPage, config: CONFIG });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const place of document.querySelectorAll(".plot")) Plotly.relayout(place, textColour());
});

function projections(figure, pairs) {
  const layer = byId("projection-layer"), positions = byId("projection-positions");
  const views = Object.fromEntries(figure.layout.sliders[0].steps.map((step) => [step.label, step.args]));
  const show = () => {
    const [points, { "title.text": title, ...ranges }, traces] = views[`${positions.value}/${layer.value}`];
    Plotly.update(byId("plot-projections"), points, ranges, traces);
    byId("projection-layer-shown").textContent = layer.value;
    byId("projection-caption").textContent = title;
    const mistakes = points.x.flatMap((x, side) => pairs.filter((_, i) => (side ? x[i] <= 0 : x[i] >= 0))
      .map((pair) => `${figure.data[side].name}: ${pair[SIDES[side]]} (${pair.category} ${pair.id})`));
    byId("projection-mistakes").replaceChildren(...mistakes.map((text) => element("li", "", text)));
  };
  layer.addEventListener("input", show);
  positions.addEventListener("change", show);
  show();
}

// Transcripts

const PAGE_SIZE = 5;
const rounded = (score) => typeof score === "number" ? String(+score.toFixed(2)) : score ? "yes" : "no";

function transcripts({ pairs, pieces, layers, score, step, scores }, suffix) {
  const byId = (id) => document.getElementById(id + suffix); // the controls of these transcripts
  const bytes = Uint8Array.from(atob(scores), (c) => c.charCodeAt(0));
  const values = new Int8Array(bytes.buffer), perLayer = values.length / layers.length;
  let offset = 0, first = 0, matching = pairs;
  for (const pair of pairs) {
    for (const side of SIDES) { // in the order the scores were written in
      const texts = pair[side];
      texts.offset = offset;
      texts.before.offset = texts.offset + texts.prompt_tokens.length;
      texts.after.offset = texts.before.offset + texts.before.tokens.length;
      offset = texts.after.offset + texts.after.tokens.length;
    }
  }

  function colour(token) {
    const score = values[byId("token-layer").value * perLayer + Number(token.dataset.index)] * step;
    const text = (score > 0 ? "+" : "") + score.toFixed(2);
    token.style.setProperty("--score", Math.max(-1.5, Math.min(1.5, score)));
    token.title = `score ${text}`;
    token.lastChild.textContent = text;
  }

  function tokens(ids, start, className, newline = "\n") {
    const line = element("p", className);
    ids.forEach((id, i) => {
      const token = element("span", "token", pieces[id].replaceAll("\n", newline));
      token.dataset.index = start + i;
      token.append(element("i"));
      colour(token);
      line.append(token);
    });
    return line;
  }

  function answer(name, record) {
    const column = element("div", "answer-column");
    const heading = element("div", "", `${name} `);
    const refused = record.refused ? "badge refused" : "badge", verdict = record.refused ? "refused" : "answered";
    heading.append(score ? element("span", "badge", `${score} ${rounded(record.score)}`) : element("span", refused, verdict));
    column.append(heading, tokens(record.tokens, record.offset, "tokens"));
    return column;
  }

  function card(pair) {
    const article = element("article", "pair");
    article.append(element("h3", "", `${pair.category.replaceAll("_", " ")}, ${pair.id}`));
    for (const side of SIDES) {
      const texts = pair[side], block = element("div", "side");
      const prompt = tokens(texts.prompt_tokens, texts.offset, "tokens prompt-tokens", "\u21b5");
      const columns = element("div", "answers");
      columns.append(answer("Before", texts.before), answer("After", texts.after));
      block.append(element("strong", "", page.sides[SIDES.indexOf(side)]), prompt, columns);
      article.append(block);
    }
    return article;
  }

  const change = (texts) => Number(texts.after.score) - Number(texts.before.score);
  const filters = {
    all: () => true,
    fell: (pair) => SIDES.some((s) => change(pair[s]) < 0),
    rose: (pair) => SIDES.some((s) => change(pair[s]) > 0),
    lifted: (pair) => SIDES.some((s) => pair[s].before.refused && !pair[s].after.refused),
    stayed: (pair) => SIDES.some((s) => pair[s].before.refused && pair[s].after.refused),
    new: (pair) => SIDES.some((s) => !pair[s].before.refused && pair[s].after.refused),
    changed: (pair) => pair.natural.before.text !== pair.natural.after.text,
  };

  function select() {
    const category = byId("token-category").value, words = byId("token-search").value.toLowerCase();
    const holds = (pair) => SIDES.some((s) => [pair[s].prompt, pair[s].before.text, pair[s].after.text]
      .some((text) => text.toLowerCase().includes(words)));
    const wanted = filters[byId("token-filter").value];
    matching = pairs.filter((pair) => (!category || pair.category === category) && wanted(pair) && holds(pair));
    first = 0;
    show();
  }

  function show() {
    const last = Math.min(first + PAGE_SIZE, matching.length);
    byId("transcript-list").replaceChildren(...matching.slice(first, last).map(card));
    byId("token-page").textContent = matching.length ? `${first + 1} to ${last} of ${matching.length} pairs` : "no pairs";
    byId("token-back").disabled = first === 0;
    byId("token-next").disabled = last === matching.length;
  }

  byId("token-layer").addEventListener("input", () => {
    byId("token-layer-shown").textContent = layers[byId("token-layer").value];
    byId("transcript-list").querySelectorAll(".token").forEach(colour);
  });
  byId("token-numbers").addEventListener("change", (event) => {
    byId("transcript-list").classList.toggle("with-numbers", event.target.checked);
  });
  for (const id of ["token-category", "token-filter"]) byId(id).addEventListener("change", select);
  byId("token-search").addEventListener("input", select);
  byId("token-back").addEventListener("click", () => { first -= PAGE_SIZE; show(); });
  byId("token-next").addEventListener("click", () => { first += PAGE_SIZE; show(); });
  select();
}

if (page.projections) projections(page.figures.projections, page.projections);
for (const { data, suffix } of page.transcripts) transcripts(data, suffix);

// Files to repeat the experiment with

const files = { manifest: ["manifest.json", page.manifest], pairs: page.pairs };
if (page.manifest) byId("manifest-text").textContent = JSON.stringify(page.manifest, null, 1);
for (const button of document.querySelectorAll("[data-saves]")) {
  button.addEventListener("click", () => {
    const [name, content] = files[button.dataset.saves], link = element("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
