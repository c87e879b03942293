'use strict';
// Everything is read from the page itself and from the packed columns in #data; text is only ever set as text.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId('data').textContent);
  const unpack = (text, Words) => {
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let k = 0; k < raw.length; k++) bytes[k] = raw.charCodeAt(k);
    const view = new DataView(bytes.buffer), out = new Words(bytes.length / 4);
    for (let k = 0; k < out.length; k++) {
      out[k] = Words === Int32Array ? view.getInt32(4 * k, true) : view.getFloat32(4 * k, true);
    }
    return out;
  };
  const columns = {};
  for (const [name, text] of Object.entries(data.ints)) columns[name] = unpack(text, Int32Array);
  for (const [name, text] of Object.entries(data.floats)) columns[name] = unpack(text, Float32Array);

  const main = byId('main'), told = byId('told');
  const signed = (x) => ((x < 0 ? '' : '+') + x.toExponential(3)).replaceAll('-', '\u2212');
  const plain = (x) => String(Number(x.toPrecision(4))).replaceAll('-', '\u2212');
  const share = (x) => (data.whole ? ` (${(100 * x / data.whole).toPrecision(3).replaceAll('-', '\u2212')} %)` : '');
  const tokens = (says) => [...says.getElementsByTagName('i')];

  // what one token did
  const tell = (token) => {
    const says = token.parentElement, article = says.parentElement;
    const k = Number(article.dataset.k) + tokens(says).indexOf(token);
    const said = [
      `id ${columns.token[k]}, position ${columns.position[k]} of sequence ${article.id.slice(1)}`,
      `contribution ${signed(columns.contribution[k])} ${data.unit}${share(columns.contribution[k])}`,
    ];
    for (const name of Object.keys(columns)) {
      if (name.startsWith('through_')) said.push(`through ${name.slice(8)} ${signed(columns[name][k])}`);
    }
    said.push(`logp ${plain(columns.logp[k])} nats`, `entropy ${plain(columns.entropy[k])} nats`);
    if (columns.advantage) said.push(`advantage ${plain(columns.advantage[k])}`);
    const word = document.createElement('b');
    word.textContent = `\u201c${token.textContent.replaceAll('\n', '')}\u201d`;
    told.replaceChildren(word, ...said.map((text) => {
      const span = document.createElement('span');
      span.textContent = text;
      return span;
    }));
    told.hidden = false;
  };
  const tokenOf = (event) => event.target.closest?.('.says > i') ?? null;
  const focus = (token) => { token.tabIndex = -1; token.focus(); };
  main.addEventListener('mouseover', (event) => { const token = tokenOf(event); if (token) tell(token); });
  main.addEventListener('focusin', (event) => { const token = tokenOf(event); if (token) tell(token); });
  main.addEventListener('click', (event) => { const token = tokenOf(event); if (token) focus(token); });
  main.addEventListener('keydown', (event) => {
    const says = event.target.closest?.('.says');
    const steps = { ArrowRight: (k) => k + 1, ArrowLeft: (k) => k - 1, Home: () => 0, End: () => Infinity };
    if (!says || !(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    const all = tokens(says), to = steps[event.key](all.indexOf(event.target));
    if (all.length) focus(all[Math.max(0, Math.min(to, all.length - 1))]);
    event.preventDefault();
  });
  document.addEventListener('keydown', (event) => { if (event.key === 'Escape') told.hidden = true; });

  // order of prompts, and of the sequences of each
  const keys = {
    size: (box) => -Math.abs(box.dataset.s), batch: (box) => Number(box.dataset.i),
    up: (box) => -box.dataset.s, down: (box) => Number(box.dataset.s),
  };
  const arrange = (parent, kind, key) => {
    const boxes = [...parent.children].filter((child) => child.localName === kind);
    parent.append(...boxes.sort((a, b) => key(a) - key(b) || a.dataset.i - b.dataset.i));
  };
  byId('order').addEventListener('change', (event) => {
    const key = keys[event.target.value];
    arrange(main, 'section', key);
    for (const section of main.children) arrange(section, 'article', key);
    matches = null;
  });

  // find text: in a prompt as a whole, in a completion at its tokens
  let matches = null, asked = '', at = -1;
  const marked = () => document.querySelectorAll('.hit');
  const overlapping = (says, from, to) => {
    const hit = [];
    let end = 0;
    for (const node of says.children) {
      const start = end;
      end += node.textContent.length;
      if (end > from && start < to) hit.push(node);
      if (start >= to) break;
    }
    return hit;
  };
  const search = (text) => {
    matches = [];
    for (const box of main.querySelectorAll('.ask, .says')) {
      const within = box.textContent.toLowerCase();
      for (let k = within.indexOf(text); k >= 0; k = within.indexOf(text, k + text.length)) {
        matches.push([box, k, k + text.length]);
        if (box.className === 'ask') break;
      }
    }
  };
  const step = (by) => {
    const text = byId('find').value.toLowerCase();
    for (const node of marked()) node.classList.remove('hit');
    if (!text) { byId('found').value = ''; return; }
    if (!matches || text !== asked) { search(text); asked = text; at = by > 0 ? -1 : 0; }
    if (!matches.length) { byId('found').value = 'not found'; return; }
    at = (at + by + matches.length) % matches.length;
    const [box, from, to] = matches[at];
    const hit = box.className === 'ask' ? [box] : overlapping(box, from, to);
    for (const node of hit) node.classList.add('hit');
    hit[0].scrollIntoView({ block: 'center' });
    const token = hit.find((node) => node.localName === 'i');
    if (token) tell(token);
    byId('found').value = `${(at + 1).toLocaleString('en')} of ${matches.length.toLocaleString('en')}`;
  };
  byId('find').addEventListener('input', () => { matches = null; step(1); });
  byId('next').addEventListener('click', () => step(1));
  byId('previous').addEventListener('click', () => step(-1));

  const go = () => {
    const number = byId('goto').value.trim(), article = /^\d+$/.test(number) ? byId(`s${Number(number)}`) : null;
    byId('missing').value = article || !number ? '' : 'not on this page';
    if (!article) return;
    article.scrollIntoView({ block: 'start' });
    article.querySelector('.says').focus({ preventScroll: true });
  };
  byId('goto').addEventListener('change', go);
  byId('controls').addEventListener('submit', (event) => event.preventDefault());
  byId('controls').addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.target.localName !== 'input') return;
    event.preventDefault();
    if (event.target.id === 'find') step(event.shiftKey ? -1 : 1); else go();
  });
  byId('controls').hidden = false;
})();
