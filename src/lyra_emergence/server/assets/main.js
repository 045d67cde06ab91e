// Puts the parts together: keys, dialogs, and the stream of what the server tells.

const SOONEST = 500; // milliseconds until the stream is asked for again, twice as long each time
const LATEST = 8000;

function askForKey(wrong) {
  const door = byId("door");
  byId("door-told").textContent = wrong
    ? "That key is wrong."
    : "Whoever started it knows the key. It is kept until this tab is closed.";
  byId("door-told").toggleAttribute("data-wrong", wrong);
  byId("key").value = "";
  door.onclose = () => door.showModal(); // a browser lets the second Esc through, and nothing works without the key
  door.showModal();
  return new Promise((resolve) => {
    byId("enter").onsubmit = (event) => {
      event.preventDefault();
      const key = byId("key").value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) return;
      door.onclose = null;
      door.close();
      byId("question").focus();
      resolve(key);
    };
  });
}

const server = new Server(askForKey);
const chat = new Chat(server);
const placement = new Placement();
const question = byId("question");

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
}

function send() {
  const text = question.value.trim();
  if (!text || chat.busy) return;
  question.value = "";
  fit();
  chat.ask(text);
}

function link(state, told) {
  if (byId("link").dataset.state === state) return;
  byId("link").dataset.state = state;
  byId("link").textContent = told;
}

function take({ name, data }) {
  link("live", "live");
  if (name === "placement") {
    chat.journal = data.journal;
    byId("welcome").textContent = data.journal ? `Ask a question about ${data.journal}.` : "Ask a question. There is no journal.";
    placement.draw(data);
  } else if (name === "figures") {
    placement.figures(data);
  } else if (name === "memory" && placement.memory(data)) {
    say(data.message);
  }
}

function shown() {
  return new Promise((resolve) => {
    if (!document.hidden) resolve();
    else document.addEventListener("visibilitychange", resolve, { once: true });
  });
}

/** Listens for as long as the page is looked at: a browser gives all tabs of a server six connections together. */
async function listen() {
  let pause = SOONEST;
  for (;;) {
    await shown();
    const leaving = new AbortController();
    const look = () => document.hidden && leaving.abort();
    document.addEventListener("visibilitychange", look);
    try {
      placement.forget();
      for await (const event of server.events("/lyra/events", { signal: leaving.signal })) {
        pause = SOONEST;
        take(event);
      }
    } catch (error) {
      if (error instanceof Refused) console.warn(error.message);
    }
    document.removeEventListener("visibilitychange", look);
    if (leaving.signal.aborted) continue;
    link("away", "no connection, trying again");
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(LATEST, 2 * pause);
  }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => {
  chat.stop();
  question.focus();
});
byId("anew").addEventListener("click", () => {
  chat.clear();
  question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
byId("door").addEventListener("cancel", (event) => event.preventDefault());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-closes]")?.addEventListener("click", () => dialog.close());
}
byId("passage").addEventListener("click", (event) => {
  if (event.target === event.currentTarget) event.currentTarget.close();
});
if (matchMedia("(max-width: 52rem)").matches) byId("placement").open = false;
watchTheEnd();
listen();
