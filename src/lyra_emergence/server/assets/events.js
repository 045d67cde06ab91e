// Talking to the server: the key, its errors, and streams of events. EventSource could not send a key.

const KEY = "lyra-key";

/** What the server refused, in its own words. */
class Refused extends Error {
  constructor(status, told, pause) {
    const hint = told?.hint ?? "";
    const message = told?.message ?? `the server answered with status ${status}`;
    super(hint ? message.replace(` (${hint})`, "") : message);
    this.status = status;
    this.hint = hint;
    this.pause = pause;
  }
}

/** The server that this page came from. `askForKey(wrong)` resolves to the key that its reader types. */
class Server {
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
  }

  /** Yields `{name, data}` for each event; throws `Refused`, or what fetch throws where there is no server. */
  async *events(path, { body, signal } = {}) {
    const response = await this.fetch(path, body, signal);
    yield* readEvents(response.body);
  }

  async fetch(path, body, signal) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = key ? { Authorization: `Bearer ${key}` } : {};
      const asked = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
      if (body !== undefined) headers["Content-Type"] = "application/json";
      const response = await fetch(path, { ...asked, headers, signal, cache: "no-store" });
      if (response.ok) return response;
      const told = await response.json().catch(() => null);
      if (response.status !== 401) throw new Refused(response.status, told?.error, response.headers.get("Retry-After"));
      await this.newKey(key);
    }
  }

  /** Waits for a key other than the refused one; several requests wait for the same answer. */
  async newKey(refused) {
    if (sessionStorage.getItem(KEY) !== refused) return;
    this.asking ??= this.askForKey(refused !== null).finally(() => { this.asking = null; });
    sessionStorage.setItem(KEY, await this.asking);
  }
}

/** Yields the events of a body as they arrive. */
async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const whole = held.split("\n\n");
      held = whole.pop();
      for (const text of whole) {
        const event = readEvent(text);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function readEvent(text) {
  let name = "message";
  let data = "";
  for (const line of text.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  return data ? { name, data: JSON.parse(data) } : null;
}

