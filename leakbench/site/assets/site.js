// Sort, filter, compare, CSV and permalinks on tables that are complete without it. Texts go in by textContent only.
"use strict";
(() => {
  const make = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const text = (cell) => cell.textContent.replace(/\s+/g, " ").trim();
  const boards = new Map();

  class Board {
    constructor(table) {
      this.table = table;
      this.id = table.dataset.table;
      this.body = table.tBodies[0];
      this.heads = [...table.tHead.rows[0].cells];
      this.lines = [...this.body.rows].map((row) => ({ row, cells: [...row.cells], key: row.dataset.key || row.id }));
      this.titles = this.heads.map((head) => text(head.querySelector("span")));
      this.state = { sort: "", q: "", keep: {}, compare: [] };
      this.tools();
      this.buttons();
      if ("compare" in table.dataset) this.boxes();
    }

    value(line, column) {
      const cell = line.cells[column];
      if (this.heads[column].dataset.kind === "text" && !("v" in cell.dataset)) return text(cell).toLowerCase();
      const shown = cell.dataset.v ?? text(cell);
      return shown === "" || Number.isNaN(Number(shown)) ? null : Number(shown);
    }

    // An address names columns: what it sorts by is the same after another column came.
    sorted() {
      const dot = this.state.sort.lastIndexOf(".");
      return [this.titles.indexOf(this.state.sort.slice(0, dot)), this.state.sort.slice(dot + 1)];
    }

    buttons() {
      this.heads.forEach((head, column) => {
        const span = head.querySelector("span");
        const button = make("button", { type: "button" }, span.textContent);
        button.addEventListener("click", () => {
          const [now, way] = this.sorted();
          const first = head.dataset.kind === "number" ? "desc" : "asc";
          const second = first === "desc" ? "asc" : "desc";
          this.state.sort = `${this.titles[column]}.${now === column && way === first ? second : first}`;
          this.show(true);
        });
        span.replaceWith(button);
      });
    }

    tools() {
      const tools = make("div", { className: "tools" });
      this.count = make("span");
      this.count.setAttribute("aria-live", "polite");
      if (this.lines.length > 3) {
        this.search = make("input", { type: "search" });
        this.search.addEventListener("input", () => { this.state.q = this.search.value; this.show(true); });
        tools.append(make("label", {}, "Filter lines", this.search));
      }
      this.selects = [];
      this.heads.forEach((head, column) => {
        const values = "choose" in head.dataset ? [...new Set(this.lines.map((line) => text(line.cells[column])))].sort() : [];
        if (values.length < 2) return;
        const select = make("select", {}, make("option", { value: "" }, "all"), ...values.map((v) => make("option", { value: v }, v)));
        select.addEventListener("change", () => {
          if (select.value) this.state.keep[this.titles[column]] = select.value; else delete this.state.keep[this.titles[column]];
          this.show(true);
        });
        this.selects.push([column, select]);
        tools.append(make("label", {}, this.titles[column], select));
      });
      const csv = make("button", { type: "button" }, "CSV of these lines");
      csv.addEventListener("click", () => this.csv());
      tools.append(csv, this.count);
      (this.table.closest(".scroll") || this.table).before(tools);
      this.panel = make("div", { className: "compared", hidden: true });
      this.panel.setAttribute("role", "region");
      this.panel.setAttribute("aria-label", "Comparison");
      this.panel.setAttribute("aria-live", "polite");
      (this.table.closest(".scroll") || this.table).after(this.panel);
    }

    boxes() {
      this.table.tHead.rows[0].append(make("th", { scope: "col" }, "compare"));
      for (const line of this.lines) {
        line.box = make("input", { type: "checkbox" });
        line.box.setAttribute("aria-label", `Compare ${text(line.cells[0])}`);
        line.box.addEventListener("change", () => {
          this.state.compare = this.state.compare.filter((key) => key !== line.key);
          if (line.box.checked) this.state.compare.push(line.key);
          this.show(true);
        });
        line.row.append(make("td", {}, line.box));
      }
    }

    kept(line) {
      const words = this.state.q.toLowerCase().split(/\s+/).filter(Boolean);
      const all = text(line.row).toLowerCase();
      return words.every((word) => all.includes(word)) &&
        Object.entries(this.state.keep).every(([title, value]) => text(line.cells[this.titles.indexOf(title)]) === value);
    }

    show(write) {
      const [column, way] = this.sorted();
      const order = [...this.lines];
      if (column >= 0) {
        const sign = way === "desc" ? -1 : 1;
        const values = new Map(order.map((line) => [line, this.value(line, column)]));
        order.sort((a, b) => {
          const [x, y] = [values.get(a), values.get(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          return x < y ? -sign : x > y ? sign : 0;
        });
      }
      this.heads.forEach((head, i) => {
        if (i === column) head.setAttribute("aria-sort", way === "desc" ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      let visible = 0;
      for (const line of order) {
        line.row.hidden = !this.kept(line);
        visible += line.row.hidden ? 0 : 1;
        this.body.append(line.row);
      }
      const sorted = column < 0 ? "" : `, by ${this.titles[column]} ${way === "desc" ? "descending" : "ascending"}`;
      this.count.textContent = `${visible} of ${this.lines.length} lines${sorted}`;
      if (this.search) this.search.value = this.state.q;
      for (const [i, select] of this.selects) select.value = this.state.keep[this.titles[i]] || "";
      this.compared();
      if (write) save();
    }

    compared() {
      if (!("compare" in this.table.dataset)) return;
      const chosen = this.lines.filter((line) => this.state.compare.includes(line.key));
      for (const line of this.lines) line.box.checked = chosen.includes(line);
      this.panel.hidden = chosen.length < 2;
      this.panel.replaceChildren();
      if (chosen.length < 2) return;
      const cell = (tag, value, scope) => { const made = make(tag, {}, value); if (scope) made.scope = scope; return made; };
      const head = make("tr", {}, cell("th", this.titles[0], "col"), ...chosen.map((line) => cell("th", text(line.cells[0]), "col")));
      const rows = this.titles.slice(1).map((title, i) =>
        make("tr", {}, cell("th", title, "row"), ...chosen.map((line) => cell("td", text(line.cells[i + 1])))));
      this.panel.append(make("table", {}, make("caption", {}, "Side by side"), make("thead", {}, head), make("tbody", {}, ...rows)));
      const data = document.querySelector(`script[data-pairs="${CSS.escape(this.id)}"]`);
      const pairs = data ? JSON.parse(data.textContent) : {};
      const told = [];
      for (const a of chosen) for (const b of chosen) if (`${a.key} ${b.key}` in pairs) told.push(make("li", {}, pairs[`${a.key} ${b.key}`]));
      if (told.length) this.panel.append(make("p", {}, "Paired differences [95%, over victims and tasks]:"), make("ul", {}, ...told));
    }

    csv() {
      const quote = (value) => `"${(/^[=+\-@]/.test(value) && Number.isNaN(Number(value)) ? "'" : "") + value.replaceAll('"', '""')}"`;
      const rows = [...this.body.rows].filter((row) => !row.hidden);
      const parts = (row, i) => JSON.parse(row.cells[i].dataset.parts || "{}");
      const shown = (row, i) => {
        const cell = row.cells[i];
        if (this.heads[i].dataset.kind === "text") return text(cell);
        const main = cell.cloneNode(true);
        main.querySelector("small")?.remove();
        const value = cell.dataset.v ?? text(main);
        return value === "–" ? "" : value;
      };
      const columns = this.titles.flatMap((title, i) => {
        const names = [...new Set(this.lines.flatMap((line) => Object.keys(parts(line.row, i))))];
        const more = names.map((name) => [`${title} ${name}`, (row) => String(parts(row, i)[name] ?? "")]);
        return [[title, (row) => shown(row, i)], ...more];
      });
      const lines = [columns.map(([title]) => quote(title)), ...rows.map((row) => columns.map(([, read]) => quote(read(row))))];
      const blob = new Blob([lines.map((line) => line.join(",")).join("\r\n") + "\r\n"], { type: "text/csv" });
      const link = make("a", { href: URL.createObjectURL(blob), download: `${this.id}.csv` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }
  }

  const save = () => {
    const state = new URLSearchParams();
    for (const [id, board] of boards) {
      if (board.state.sort) state.set(`${id}~sort`, board.state.sort);
      if (board.state.q) state.set(`${id}~q`, board.state.q);
      for (const [title, value] of Object.entries(board.state.keep)) state.set(`${id}~is~${title}`, value);
      if (board.state.compare.length) state.set(`${id}~compare`, board.state.compare.join(" "));
    }
    history.replaceState(null, "", `${location.pathname}${location.search}#${state}`);
  };

  const load = () => {
    const hash = location.hash.slice(1);
    const state = new URLSearchParams(hash.includes("=") ? hash : "");
    for (const [id, board] of boards) {
      const fresh = { sort: state.get(`${id}~sort`) || "", q: state.get(`${id}~q`) || "", keep: {}, compare: [] };
      for (const [name, value] of state) {
        const title = name.startsWith(`${id}~is~`) ? name.slice(id.length + 4) : "";
        if (board.titles.includes(title)) fresh.keep[title] = value;
      }
      fresh.compare = (state.get(`${id}~compare`) || "").split(" ").filter(Boolean);
      const changed = JSON.stringify(fresh) !== JSON.stringify(board.state);
      board.state = fresh;
      if (changed || !board.count.textContent) board.show(false);
      if (changed && !board.panel.hidden) board.panel.scrollIntoView({ block: "center" });
    }
  };

  for (const table of document.querySelectorAll("table[data-table]")) boards.set(table.dataset.table, new Board(table));
  load();
  addEventListener("hashchange", load);
})();
