// Messages of a conversation: their text, and the tree that they form. A tree is a Map of messages by id.

// Return the text of a message's content, which may have parts. Parts with a `name` are files.
export function textOf(content, { withFiles = true } = {}) {
  if (typeof content === "string") return content;
  const texts = (content ?? []).filter((part) => part.type === "text" && (withFiles || !part.name));
  return texts.map((part) => part.text).join("\n");
}

// Return the messages from the first to a leaf.
export function branch(tree, leaf) {
  const path = [];
  for (let message = tree.get(leaf); message; message = tree.get(message.parent)) path.unshift(message);
  return path;
}

// Return the messages with the same parent, the oldest first.
export function siblings(tree, message) {
  return [...tree.values()].filter((item) => item.parent === message.parent).sort((a, b) => a.created - b.created);
}

// Return the id of the last message of the newest branch that begins with a message.
export function newestLeaf(tree, message) {
  for (;;) {
    const children = [...tree.values()].filter((item) => item.parent === message.id);
    if (children.length === 0) return message.id;
    message = children.reduce((newest, item) => (item.created > newest.created ? item : newest));
  }
}

// Return whether the model can continue an answer. A tool call, or JSON that keeps to a schema, can only start again.
export const canContinue = (message) => Boolean(message.content) && !message.isJson && !message.toolCalls?.length;
