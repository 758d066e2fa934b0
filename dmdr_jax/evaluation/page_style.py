"""The report's style sheet."""

STYLE = """
:root { --paper: #fbfaf7; --card: #ffffff; --ink: #1d2329; --soft: #67717b; --line: #e2e0d9; --accent: #0f6f78;
  --good: #1d7a45; --bad: #b3372c; --open: #86703a; --s0: #0f6f78; --s1: #c4622d; --s2: #6b55b8; --s3: #7d8b2f;
  --s4: #b04a7d; --s5: #3b6fc4; --s6: #8a6a4a; --s7: #5b6b6f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181b; --card: #1c2226; --ink: #e6e8e6; --soft: #97a1a8;
  --line: #313a40; --accent: #5cc0c8; --good: #63c98c; --bad: #ef8377; --open: #d6b968; --s0: #5cc0c8; --s1: #ef9a6a;
  --s2: #a996ee; --s3: #bccb6a; --s4: #ea8fbb; --s5: #8db4f2; --s6: #cfae8d; --s7: #a9b8bc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.02em; }
h2 { font-size: 1.25rem; margin: 52px 0 10px; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 26px 0 6px; }
p { margin: 8px 0; max-width: 92ch; }
.lead, .note { color: var(--soft); }
.note { font-size: .88rem; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 22px 0 0; padding: 0; list-style: none; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px 14px;
  min-width: 96px; }
.facts b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .8rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--open);
  border-radius: 10px; padding: 12px 18px; margin: 12px 0; }
.verdict.better { border-left-color: var(--good); } .verdict.worse { border-left-color: var(--bad); }
.verdict p { margin: 2px 0; max-width: none; }
.tag { font-size: .74rem; font-weight: 650; text-transform: uppercase; letter-spacing: .06em; color: var(--open); }
.better > .tag, .good { color: var(--good); } .worse > .tag, .bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--card-width, 250px), 1fr)); gap: 14px;
  margin-top: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0;
  padding: 10px 12px 12px; }
.card figcaption { font-size: .88rem; min-height: 2.9em; line-height: 1.35; margin-bottom: 8px; }
.trio { display: flex; gap: 8px; } .trio div { flex: 1; min-width: 0; font-size: .74rem; color: var(--soft); }
.trio div > span { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
img { display: block; width: 100%; border-radius: 5px; border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; margin-top: 12px; }
.strip figure { margin: 0; } .strip figcaption { color: var(--soft); font-size: .85rem; margin-bottom: 5px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 16px; margin-top: 12px; }
.chart { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0;
  padding: 12px 14px 4px; }
.chart figcaption { font-size: .9rem; font-weight: 600; }
.key { font-weight: 400; color: var(--soft); font-size: .8rem; margin-right: 14px; white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle;
  margin-right: 5px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); } svg text.mark { fill: var(--accent); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--accent); stroke-dasharray: 4 4; }
svg text.mark { stroke: none; }
svg path { fill: none; stroke-linejoin: round; } svg .raw { stroke-width: 1; opacity: .28; }
svg .line { stroke-width: 2.2; }
svg .s0 { stroke: var(--s0); } svg .s1 { stroke: var(--s1); }
svg .s2 { stroke: var(--s2); } svg .s3 { stroke: var(--s3); }
svg .s4 { stroke: var(--s4); } svg .s5 { stroke: var(--s5); }
svg .s6 { stroke: var(--s6); } svg .s7 { stroke: var(--s7); }
svg .b0 { fill: var(--s0); } svg .b1 { fill: var(--s1); } svg .b2 { fill: var(--s2); } svg .b3 { fill: var(--s3); }
svg .b4 { fill: var(--s4); } svg .b5 { fill: var(--s5); } svg .b6 { fill: var(--s6); } svg .b7 { fill: var(--s7); }
svg .whisker { stroke: var(--ink); stroke-width: 1.2; }
.wide { margin-top: 14px; overflow-x: auto; } .wide svg { max-height: 300px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .76rem; line-height: 1.25; white-space: normal;
  vertical-align: bottom; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card);
  font-weight: 600; }
td > b { font-size: .72em; vertical-align: .1em; }
tr.floor td { color: var(--soft); font-style: italic; }
td { vertical-align: top; } td small { display: block; color: var(--soft); font-size: .82em; font-weight: 400; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; margin: 6px 0 16px; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 56px; padding-top: 12px; color: var(--soft); font-size: .82rem;
  border-top: 1px solid var(--line); }
"""
