// Text of a model as nodes: a little Markdown, and citations as buttons. No text is ever read as markup.

const CITATION = /\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\]/;
const INLINE = new RegExp(
  [
    "`([^`\\n]+)`", // code
    "\\*\\*([^*\\n]+)\\*\\*", // bold
    "(?<![*\\w])\\*([^*\\s][^*\\n]*)\\*(?![*\\w])", // italic
    "(?<!\\w)_([^_\\s][^_\\n]*)_(?!\\w)", // italic
    CITATION.source,
  ].join("|"),
  "g",
);
const ITEM = /^\s*(?:[-*+]|(\d{1,3})[.)])\s+(.*)$/;

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** Returns the numbers that a text cites, each once, in order of appearance. */
function citationsOf(text) {
  const groups = text.matchAll(new RegExp(CITATION, "g"));
  return [...new Set([...groups].flatMap((found) => found[1].match(/\d+/g).map(Number)))];
}

/** Returns `text` as blocks; `cite(number)` returns the node for a citation, or null where there is no such source. */
function blocksOf(text, cite) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = [];
  const end = () => {
    if (paragraph.length) blocks.push(make("p", {}, ...inline(paragraph.join("\n"), cite)));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at++) {
    const line = lines[at];
    if (/^\s*```/.test(line)) {
      end();
      const code = [];
      while (++at < lines.length && !/^\s*```\s*$/.test(lines[at])) code.push(lines[at]);
      blocks.push(make("pre", { tabIndex: 0 }, make("code", {}, code.join("\n"))));
    } else if (ITEM.test(line)) {
      end();
      addItem(blocks, line.match(ITEM), cite);
    } else if (/^#{1,6}\s+\S/.test(line)) {
      end();
      blocks.push(make("p", {}, make("strong", {}, ...inline(line.replace(/^#+\s+/, ""), cite))));
    } else if (line.trim()) {
      paragraph.push(line);
    } else {
      end();
    }
  }
  end();
  return blocks;
}

function addItem(blocks, [, number, text], cite) {
  const tag = number === undefined ? "UL" : "OL";
  let list = blocks.at(-1);
  if (list?.tagName !== tag) {
    list = make(tag);
    if (number !== undefined) list.start = Number(number);
    blocks.push(list);
  }
  list.append(make("li", {}, ...inline(text, cite)));
}

function inline(text, cite) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    const [all, code, bold, star, score, numbers] = found;
    const italic = star ?? score;
    const before = text.slice(from, found.index);
    from = found.index + all.length;
    nodes.push(before);
    if (code !== undefined) nodes.push(make("code", {}, code));
    else if (bold !== undefined) nodes.push(make("strong", {}, ...inline(bold, cite)));
    else if (italic !== undefined) nodes.push(make("em", {}, ...inline(italic, cite)));
    else nodes.push(...cited(all, numbers, cite));
  }
  nodes.push(text.slice(from));
  return nodes.filter((node) => node !== "");
}

function cited(all, numbers, cite) {
  const made = numbers.match(/\d+/g).map((number) => cite(Number(number)));
  return made.includes(null) ? [all] : made;
}

