// What is remembered besides conversations. A browser may forbid that: then it is until the page is closed.

const PREFIX = "minimind-"; // other programs at the same address have theirs
const own = new Map(); // what could not be kept

export function remember(name, value, storage = "localStorage") {
  try {
    globalThis[storage].setItem(PREFIX + name, value);
    own.delete(name);
  } catch {
    own.set(name, value); // forbidden, or full
  }
}

/** What was remembered under a name; null if nothing was. */
export function remembered(name, storage = "localStorage") {
  try {
    return own.get(name) ?? globalThis[storage].getItem(PREFIX + name);
  } catch {
    return null;
  }
}
