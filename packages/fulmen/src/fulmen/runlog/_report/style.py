"""The look of the page: light or dark as the reader's system is, and one column on a phone."""

from __future__ import annotations

from typing import Final

__all__ = ["STYLE"]

# The series' colours are those of Okabe and Ito (2008), told apart by the colour-blind; brightened for the dark page.
STYLE: Final = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1b1f27;--dim:#656d7c;--rule:#e3e6eb;--grid:#edeff3;
--accent:#3f51b5;--good:#1a7f4b;--bad:#b3261e;--wait:#8a6100;--good-bg:#e2f3e9;--bad-bg:#fbe6e4;--wait-bg:#fbf0d6;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b8558f;--c4:#a67c00;--c5:#4b9cd3}
@media(prefers-color-scheme:dark){:root{--page:#12141a;--card:#1b1e26;--ink:#e7e9ee;--dim:#99a1b1;--rule:#2c313c;
--grid:#262a34;--accent:#9fa8ff;--good:#6fd8a0;--bad:#ff9a91;--wait:#f0c565;--good-bg:#163526;--bad-bg:#43201d;
--wait-bg:#3d2f0e;--c0:#5cb3e8;--c1:#ff9350;--c2:#3fd0a4;--c3:#e69ac6;--c4:#e3bd4b;--c5:#a6d3f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:28px 20px 48px}
header{display:flex;flex-wrap:wrap;gap:6px 14px;align-items:center;margin-bottom:4px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:36px 0 12px;letter-spacing:-.005em}
h3{font-size:14px;margin:0;font-weight:600;overflow-wrap:anywhere}
.badge{font-size:13px;font-weight:600;padding:2px 11px;border-radius:99px}
.success{color:var(--good);background:var(--good-bg)}.failed{color:var(--bad);background:var(--bad-bg)}
.finished,.unfinished{color:var(--wait);background:var(--wait-bg)}
.sub{color:var(--dim);margin:0 0 20px;overflow-wrap:anywhere}
.error{background:var(--bad-bg);color:var(--bad);border-radius:10px;padding:12px 16px;margin:0 0 20px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.note{background:var(--wait-bg);color:var(--wait);border-radius:10px;padding:10px 16px;margin:0 0 20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:12px}
.tile{padding:12px 16px}
.tile b{display:block;font-size:21px;font-weight:650;line-height:1.25;letter-spacing:-.01em;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tile span{color:var(--dim);font-size:13px}
.card{padding:14px 16px;min-width:0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,345px),1fr));gap:14px}
figure{margin:0}
figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline;margin-bottom:6px}
.key{display:inline-flex;align-items:center;gap:6px;font-size:12.5px;color:var(--dim);overflow-wrap:anywhere}
.key i,.legend i{flex:none;width:10px;height:10px;border-radius:3px;background:var(--c)}
.key b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--dim);font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--grid)}.axis{stroke:var(--rule)}
.line{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke-width:1;opacity:.32}
.dot{fill:var(--c)}.bad{fill:var(--bad)}
.best{fill:none;stroke:var(--ink);stroke-width:1.6}
.bar{display:flex;height:22px;border-radius:7px;overflow:hidden;gap:2px;margin:4px 0 14px}
.bar span{background:var(--c);min-width:2px}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(215px,1fr));gap:4px 22px;margin:0;padding:0;
list-style:none;font-size:14px}
.legend li{display:flex;align-items:center;gap:8px}
.legend em{margin-left:auto;font-style:normal;color:var(--dim);font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child>*{border-bottom:0}
th{font-weight:500;color:var(--dim);white-space:nowrap}
td{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
td.num{white-space:nowrap}
.star{white-space:nowrap;color:var(--accent);font-weight:600}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
details{margin-top:12px}summary{cursor:pointer;font-weight:600;font-size:14px}
details[open] summary{margin-bottom:8px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:14px;align-items:start}
footer{margin-top:40px;color:var(--dim);font-size:13px}
@media(max-width:520px){main{padding:18px 12px 36px}h1{font-size:22px}.tiles{grid-template-columns:1fr 1fr;gap:8px}
.tile{padding:10px 12px}.tile b{font-size:18px}.card{padding:12px}.legend{grid-template-columns:1fr}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""
