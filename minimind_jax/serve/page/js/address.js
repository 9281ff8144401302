// The conversation that the page's address names; "" where it names none.

export function named() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
}

export const addressOf = (id) => `#${encodeURIComponent(id)}`;
