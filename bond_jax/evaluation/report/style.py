"""The frame, the look and the one script of report.html; nothing is fetched.

The page says so itself: its policy lets a browser run this script and apply
this style, by their hashes, show images that are in the page, and no more.
"""

import base64
import hashlib

STYLE = """
:root { --paper: #fff; --ink: #22262b; --dim: #59616a; --line: #dde1e6;
  --card: #f5f7f9; --accent: #2867b2; --warn: #fff4dc; --edge: #d89b1d; }
@media (prefers-color-scheme: dark) { :root { --paper: #1d2126;
  --ink: #dfe3e8; --dim: #a3acb6; --line: #363d45; --card: #262b31;
  --accent: #78b0f0; --warn: #3a3018; --edge: #d8a93a; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1080px; margin: 0 auto; padding: 16px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.8rem; }
h3 { font-size: 0.95rem; margin: 1.2rem 0 0.5rem; }
.lead { font-size: 1.05rem; max-width: 46rem; }
.fine, .small, .label, figcaption { color: var(--dim); font-size: 0.85rem; }
.label, .small { line-height: 1.35; }
.facts { display: grid; gap: 6px 16px; margin: 1rem 0; font-size: 0.85rem;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.facts dt { color: var(--dim); }
.facts dd { margin: 0; }
.warn { background: var(--warn); border-left: 4px solid var(--edge);
  padding: 0.6rem 1rem; margin: 1rem 0; }
.warn ul { margin: 0.3rem 0 0; padding-left: 1.2rem; }
.warn li { margin: 0.3rem 0; }
.cards { display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.card { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.value { font-size: 1.4rem; font-weight: 600; line-height: 1.3; }
.figures { display: grid; gap: 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
.tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center;
  margin: 0.8rem 0; }
.tools input, .tools select { font: inherit; color: inherit; min-width: 0;
  background: var(--card); border: 1px solid var(--dim); border-radius: 6px;
  padding: 6px 10px; flex: 1 1 240px; }
::placeholder { color: var(--dim); opacity: 1; }
.pair { display: grid; gap: 4px 24px; border-top: 1px solid var(--line);
  padding: 12px 0; grid-template-columns: 1fr 1fr 6.5rem; }
.pair p { margin: 0.1rem 0; white-space: pre-wrap; unicode-bidi: isolate; }
.when { color: var(--dim); font-size: 0.8rem; }
.change { color: var(--accent); font-size: 0.85rem; font-weight: 600;
  text-align: right; }
@media (max-width: 640px) { .pair { grid-template-columns: 1fr; gap: 10px; }
  .change { text-align: left; order: -1; } }
.prompt { color: var(--accent); font-weight: 600; }
summary { cursor: pointer; padding: 0.3rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; font-weight: 400;
  padding: 4px 12px 4px 0; border-top: 1px solid var(--line); }
th { color: var(--dim); width: 45%; }
.even { margin-bottom: 1rem; max-width: 36rem; }
.even th { width: 33%; }
"""

# Hides what does not contain the words, and reorders what there is.
SCRIPT = """
(() => {
  const list = document.querySelector('.pairs')
  if (!list) return
  const pairs = [...list.children]
  const [find, order, shown] = ['find', 'order', 'shown'].map(
    id => document.getElementById(id))
  const texts = pairs.map(pair => [...pair.querySelectorAll('.text')]
    .map(text => text.textContent.toLowerCase()))
  const update = () => {
    const sign = { drawn: 0, gain: -1, loss: 1 }[order.value]
    list.append(...[...pairs].sort(
      (a, b) => sign * (a.dataset.change - b.dataset.change)))
    const words = find.value.trim().toLowerCase()
    pairs.forEach((pair, i) => {
      pair.hidden = !texts[i].some(text => text.includes(words))
    })
    const count = pairs.filter(pair => !pair.hidden).length
    shown.textContent = `${count} of ${pairs.length} shown`
  }
  find.addEventListener('input', update)
  order.addEventListener('change', update)
  document.querySelector('.tools').hidden = false
  update()
})()
"""


def _source(text: str) -> str:
  """What a content security policy calls this inline text."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"'sha256-{base64.b64encode(digest).decode()}'"


POLICY = (
  f"default-src 'none'; img-src data:; style-src {_source(STYLE)};"
  f" script-src {_source(SCRIPT)}; base-uri 'none'; form-action 'none'"
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, body: str) -> str:
  """A whole page; both are HTML, escaped already."""
  return _PAGE.format(
    title=title, body=body, policy=POLICY, style=STYLE, script=SCRIPT
  )
