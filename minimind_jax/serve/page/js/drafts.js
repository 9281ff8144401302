// What is written and not yet sent: {text, pictures}, of each conversation, and of one that is not begun.

const NONE = { text: "", pictures: [] };
const drafts = new Map();
const keyOf = ({ record, messages }) => (messages.size ? record.id : "");

export const draftOf = (conversation) => drafts.get(keyOf(conversation)) ?? NONE;

export function setDraft(conversation, draft = NONE) {
  drafts.set(keyOf(conversation), draft);
}
