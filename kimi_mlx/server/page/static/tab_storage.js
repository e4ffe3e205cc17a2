// Texts that are kept until this tab is closed, also over a reload unless the browser stores nothing.

const inMemory = new Map();

export const tabStorage = {
  get: (name) => {
    if (inMemory.has(name)) return inMemory.get(name);
    try {
      return sessionStorage.getItem(name) ?? "";
    } catch {
      return "";
    }
  },
  set: (name, value) => {
    try {
      sessionStorage.setItem(name, value);
      inMemory.delete(name);
    } catch {
      inMemory.set(name, value); // the browser stores nothing, or the text is too long
    }
  },
};
