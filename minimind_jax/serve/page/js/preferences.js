// What is remembered besides conversations. A browser may forbid that: then it is until the page is closed.

const PREFIX = "minimind-"; // other programs at the same address have theirs
const own = new Map();

export function remember(name, value, storage = "localStorage") {
  own.set(name, value);
  try {
    globalThis[storage].setItem(PREFIX + name, value);
  } catch {
    // forbidden, or full
  }
}

/** What was remembered under a name; null if nothing was. */
export function remembered(name, storage = "localStorage") {
  try {
    return globalThis[storage].getItem(PREFIX + name);
  } catch {
    return own.get(name) ?? null;
  }
}
