// What Enter does in a field for a message.

/** Whether a key belongs to an input method (Chinese, Japanese); Safari ends the composition before the key. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** Enter sends, Shift+Enter begins a line. Enter that ends a word of an input method (Chinese, Japanese) is neither. */
export function onEnter(field, send) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
    event.preventDefault();
    send();
  });
}
