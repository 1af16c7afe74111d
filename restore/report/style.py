"""The look of a report."""

CSS = """
:root { --ink: #1b1f24; --soft: #5d6772; --line: #d6dbe1; --paper: #ffffff; --head: #f3f5f8; --warn: #9a3b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #39424d; --paper: #14181d; --head: #1d232a; --warn: #ffab6b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 21px; margin: 40px 0 8px; }
h3 { font-size: 17px; margin: 32px 0 8px; }
h4 { font-size: 15px; margin: 20px 0 6px; font-weight: 600; }
p { margin: 6px 0; max-width: 90ch; }
.source, .key, .protocol { color: var(--soft); font-size: 13px; }
.protocol { max-width: none; overflow-wrap: anywhere; }
.notes, .warnings { margin: 8px 0; padding-left: 20px; max-width: 110ch; }
.notes { color: var(--soft); font-size: 13px; }
.warnings { color: var(--warn); }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 600; text-align: left; }
.results th, .results td { padding: 6px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
.results thead th { background: var(--head); text-align: right; }
.results thead th:first-child { text-align: left; }
.results .task { text-align: center; border-left: 1px solid var(--line); }
.results td { text-align: right; vertical-align: top; }
.results tbody th { position: sticky; left: 0; background: var(--paper); vertical-align: top; font-weight: 500; }
.value { display: block; }
.value strong { font-weight: 700; }
.interval, .published, .incomplete { display: block; font-size: 11px; line-height: 1.35; color: var(--soft); }
.published { font-style: italic; }
.incomplete { color: var(--warn); }
.flat { font-size: 13px; }
.flat th, .flat td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.flat th { font-weight: 500; color: var(--soft); white-space: nowrap; }
.flat td { overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--soft); margin: 4px 0; }
.charts { display: flex; flex-wrap: wrap; gap: 20px 28px; }
.chart { font: 11.5px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; max-width: 100%; }
.chart text { fill: var(--ink); }
.chart .chart-title { font-weight: 600; font-size: 13px; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.pictures th { font-size: 12px; font-weight: 500; padding: 2px 6px; max-width: 128px; vertical-align: bottom; }
.pictures tbody th { color: var(--soft); max-width: 110px; overflow-wrap: anywhere; vertical-align: middle; }
.pictures td { padding: 3px; }
.pictures img { display: block; width: 128px; height: auto; image-rendering: pixelated; background: var(--head); }
"""
