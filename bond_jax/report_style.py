"""The frame and the look of report.html: no script, nothing fetched."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""

STYLE = """
:root { --paper: #fff; --ink: #22262b; --dim: #626a73; --line: #dde1e6;
  --card: #f5f7f9; --accent: #2867b2; --warn: #fff4dc; --edge: #d89b1d; }
@media (prefers-color-scheme: dark) { :root { --paper: #1d2126;
  --ink: #dfe3e8; --dim: #9aa3ad; --line: #363d45; --card: #262b31;
  --accent: #78b0f0; --warn: #3a3018; --edge: #d8a93a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1080px; margin: 0 auto; padding: 16px 16px 64px; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.8rem; }
.lead { font-size: 1.05rem; max-width: 46rem; }
.fine, .small, .label, figcaption { color: var(--dim); font-size: 0.85rem; }
.warn { background: var(--warn); border-left: 4px solid var(--edge);
  padding: 0.6rem 1rem; margin: 1rem 0; }
.warn ul { margin: 0.3rem 0 0; padding-left: 1.2rem; }
.cards { display: grid; gap: 10px; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.card { background: var(--card); border-radius: 8px; padding: 10px 12px; }
.value { font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.figures { display: grid; gap: 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
.pair { display: grid; gap: 0 24px; border-top: 1px solid var(--line);
  padding: 10px 0; grid-template-columns:
  repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.side p { margin: 0.1rem 0; }
.when { color: var(--dim); font-size: 0.75rem; text-transform: uppercase;
  letter-spacing: 0.05em; }
.prompt { color: var(--accent); font-weight: 600; }
summary { cursor: pointer; padding: 0.3rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; font-weight: 400;
  padding: 4px 12px 4px 0; border-top: 1px solid var(--line); }
th { color: var(--dim); width: 45%; }
.even { margin-bottom: 1rem; max-width: 36rem; }
.even th { width: 33%; }
"""
