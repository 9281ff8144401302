// What Enter does in a field for a message.

/** Enter sends, Shift+Enter begins a line. Enter that ends a word of an input method (Chinese, Japanese) is neither. */
export function onEnter(field, send) {
  field.addEventListener("keydown", (event) => {
    const composing = event.isComposing || event.keyCode === 229; // Safari ends the composition before the key
    if (event.key !== "Enter" || event.shiftKey || composing) return;
    event.preventDefault();
    send();
  });
}
