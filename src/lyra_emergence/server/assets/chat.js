// The conversation: it lives in this page, and goes to the server with each question.

const MOST_TURNS = 100;
const NEAR = 80; // pixels from the end at which a reader wants to see what comes

class Chat {
  constructor(server) {
    this.server = server;
    this.turns = [];
    this.running = null;
    this.journal = null;
  }

  get busy() {
    return this.running !== null;
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.running = null; // what it still brings belongs to no conversation
    changed(false);
    this.turns = [];
    byId("turns").replaceChildren(byId("welcome"));
    byId("welcome").hidden = false;
  }

  async ask(question) {
    const turn = new Turn(question, () => this.journal);
    byId("welcome").hidden = true;
    byId("turns").append(turn.node);
    toEnd();
    const running = (this.running = new AbortController());
    changed(true);
    say("Answering");
    try {
      const body = { question, turns: this.turns.slice(-MOST_TURNS) };
      for await (const event of this.server.events("/lyra/chat", { body, signal: running.signal })) {
        following(() => turn.take(event));
      }
      following(() => turn.end(turn.ended ? "" : "The server ended before the answer did."));
    } catch (error) {
      following(() => (running.signal.aborted ? turn.stopped() : turn.fail(error, () => this.again(turn))));
    } finally {
      if (this.running === running) {
        this.running = null;
        changed(false);
        if (turn.text.trim()) this.turns.push({ question, answer: turn.text });
      }
    }
    say(turn.spoken());
  }

  again(turn) {
    if (this.busy) return;
    turn.node.remove();
    byId("question").focus();
    this.ask(turn.question);
  }
}

/** One question and its answer. */
class Turn {
  constructor(question, journal) {
    this.question = question;
    this.journal = journal;
    this.text = "";
    this.sources = new Map();
    this.ended = false;
    this.drawn = false;
    this.failure = "";
    this.answer = make("div", { className: "answer" });
    this.state = make("p", { className: "state" }, "Reading the question");
    this.rest = make("div");
    this.node = make("article", { className: "turn" }, make("h3", { className: "asked" }, question), this.answer, this.rest, this.state);
    this.node.dataset.busy = "";
  }

  take({ name, data }) {
    if (name === "sources") this.found(data);
    else if (name === "queued") this.tell(data.ahead ? `Waiting: ${data.ahead} ahead` : "Waiting for its turn");
    else if (name === "text") this.add(data.text);
    else if (name === "answer") this.whole(data);
    else if (name === "error") throw new Refused(0, data.error, null);
  }

  found({ sources, notes }) {
    this.sources = new Map(sources.map((source) => [source.number, source]));
    this.notes = notes;
    this.tell("Reading");
  }

  add(text) {
    this.text += text;
    this.tell("Writing");
    if (this.drawn) return;
    // What comes within one frame is drawn once.
    this.drawn = true;
    requestAnimationFrame(() => following(() => this.draw()));
  }

  draw() {
    this.drawn = false;
    const focused = this.answer.contains(document.activeElement) ? document.activeElement.dataset.number : null;
    this.answer.replaceChildren(...blocksOf(this.text, (number) => this.citation(number)));
    if (focused) this.answer.querySelector(`[data-number="${focused}"]`)?.focus();
  }

  tell(state) {
    this.state.textContent = state;
  }

  whole(data) {
    this.ended = true;
    this.text = data.text;
    const { timings, usage } = data;
    const speed = timings.tokens_per_second ? ` · ${Math.round(timings.tokens_per_second)} tok/s` : "";
    this.tell(`${usage.completion_tokens} tokens${speed} · first after ${timings.prefill_seconds.toFixed(2)} s`);
    const unknown = data.unknown_citations.map((number) => `[${number}]`).join(", ");
    const notes = [
      ...data.notes,
      ...(unknown ? [`The answer cites ${unknown}, which the journal search did not find.`] : []),
      ...(data.finish_reason === "length" ? ["The answer was cut at the most tokens it may have."] : []),
      ...(data.finish_reason === "loop" ? ["The answer was ended where the model only repeated itself."] : []),
    ];
    this.rest.replaceChildren(...notes.map((note) => make("p", { className: "notes small" }, note)));
  }

  /** Draws what is there for good, with the sources that it cites. */
  end(failure = "") {
    delete this.node.dataset.busy;
    this.draw();
    const cited = citationsOf(this.text).filter((number) => this.sources.has(number));
    if (cited.length) {
      const items = cited.map((number) => make("li", {}, this.sourceButton(this.sources.get(number))));
      this.rest.prepend(make("ul", { className: "sources", ariaLabel: "Sources" }, ...items));
    }
    if (failure) this.fault(failure, "");
  }

  stopped() {
    this.tell("Stopped");
    this.end();
    this.failure = "Stopped";
  }

  fail(error, again) {
    this.tell("");
    this.end();
    const told = error instanceof Refused ? error : new Refused(0, { message: "the server cannot be reached", hint: "is it still running?" }, null);
    const pause = told.pause ? `try again in ${told.pause} s` : "";
    const box = this.fault(told.message, [told.hint, pause].filter(Boolean).join("; "));
    box.append(" ", make("button", { type: "button", onclick: again }, "Ask again"));
  }

  fault(message, hint) {
    this.failure = message;
    const kind = make("strong", {}, "Error: ");
    const box = make("div", { className: "error" }, make("p", {}, kind, message));
    if (hint) box.append(make("p", { className: "small" }, hint));
    this.rest.append(box);
    return box;
  }

  /** Returns what is read aloud at the end. */
  spoken() {
    return this.failure || this.answer.textContent;
  }

  citation(number) {
    const source = this.sources.get(number);
    if (!source) return null;
    const name = `Citation ${number}: ${source.date} · ${source.title}`;
    return this.opening(make("button", { type: "button", className: "cite", ariaLabel: name, title: `${source.date} · ${source.title}` }, `[${number}]`), source);
  }

  sourceButton(source) {
    return this.opening(make("button", { type: "button", className: "source" }, `[${source.number}] ${source.date} · ${source.title}`), source);
  }

  opening(button, source) {
    button.dataset.number = source.number;
    button.addEventListener("click", () => showPassage(source, this.journal(), button, this));
    return button;
  }
}

function showPassage(source, journal, opener, turn) {
  byId("passage-title").textContent = `${source.date} · ${source.title}`;
  byId("passage-place").textContent = journal ? `${source.entry} in ${journal}` : source.entry;
  byId("passage-text").textContent = source.passage;
  const dialog = byId("passage");
  dialog.addEventListener("close", () => {
    // The button may have been drawn anew meanwhile.
    const button = opener.isConnected ? opener : turn.node.querySelector(`[data-number="${source.number}"]`);
    (button ?? byId("question")).focus();
  }, { once: true });
  dialog.showModal();
}

let atEnd = true; // whether the reader looks at the end of the conversation

/** Does `change`, and stays at the end of the conversation where the reader was there. */
function following(change) {
  const stay = atEnd;
  change();
  if (stay) toEnd();
}

function toEnd() {
  byId("turns").scrollTop = byId("turns").scrollHeight;
}

function watchTheEnd() {
  const turns = byId("turns");
  turns.addEventListener("scroll", () => {
    atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < NEAR;
  });
  new ResizeObserver(() => atEnd && toEnd()).observe(turns);
}

function changed(busy) {
  if (document.activeElement === byId("stop")) byId("question").focus(); // it is about to vanish
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}

function say(text) {
  byId("said").textContent = text;
}

