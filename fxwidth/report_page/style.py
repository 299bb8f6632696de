"""The style of the page: light and dark, narrow and wide, and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f24; --faint: #5d626c; --paper: #fff; --line: #d9dce1; --soft: #f4f5f7;
  --accent: #2563a8; --cut: #c2410c; --gone: rgba(194, 65, 12, 0.12); }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --faint: #9aa1ad; --paper: #15171b; --line: #343942;
  --soft: #1e2127; --accent: #7ab0ea; --cut: #fb923c; --gone: rgba(251, 146, 60, 0.18); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; }
p, figcaption { margin: 0.25rem 0; }
.faint, figcaption { color: var(--faint); }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; min-width: 3rem; overflow-wrap: normal; }
td:not(.number):not(:first-child):last-child { min-width: 13rem; }
th { color: var(--faint); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); gap: 1rem; }
.grid.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 0.85em; }
figcaption b { display: block; }
svg { display: block; }
svg.chart { width: 100%; height: auto; background: var(--soft); border-radius: 4px; }
svg text { font-family: system-ui, sans-serif; fill: var(--faint); }
svg .box text { fill: #1d1f24; }
svg .kinds { opacity: 0.75; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.area { fill: var(--accent); opacity: 0.15; }
.rule { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.cut { stroke: var(--cut); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.worth { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 3 3; vector-effect: non-scaling-stroke; }
.gone { fill: var(--gone); }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em; border-radius: 2px;
  vertical-align: -0.1em; }
ul.legend { list-style: none; padding: 0; columns: 18rem; margin: 0.5rem 0; }
pre { white-space: pre-wrap; background: var(--soft); padding: 0.6rem; border-radius: 4px; margin: 0.3rem 0; }
summary { cursor: pointer; }
@media print {
  :root { color-scheme: light; --ink: #000; --faint: #444; --paper: #fff; --line: #bbb; --soft: #fff;
    --accent: #2563a8; --cut: #c2410c; --gone: rgba(194, 65, 12, 0.12); }
  body { max-width: none; padding: 0; font-size: 10pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .scroll { overflow: visible; }
  .flow { max-width: 100%; height: auto; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
