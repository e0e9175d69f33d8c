"""How a page looks, and the few lines of JavaScript that sort its tables. Without them all of it can be read.

No address of a font or a picture stands here: a page asks no network for anything.
"""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fafaf8;--card:#fff;--ink:#1c2126;--soft:#59626b;--line:#e4e3de;--band:#f3f2ee;
--accent:#0a5a8c;--good:#0b6b4f;--good-bg:#e4f2ec;--bad:#9a3d06;--bad-bg:#faeadf;--open:#4d5660;--open-bg:#ececea;
--mark:#eef5fa;--figure:#fff;
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",Arial,sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#131619;--card:#1a1e22;--ink:#e4e7ea;--soft:#9da7b0;--line:#2d3338;
--band:#20252a;--accent:#7cc0ea;--good:#7fd1b0;--good-bg:#17332a;--bad:#f2a579;--bad-bg:#3b2417;--open:#b4bdc5;
--open-bg:#2a3036;--mark:#182833;--figure:#1a1a1a}}
*,*::before,*::after{box-sizing:border-box}
html{font-size:100%;-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);font:1.0625rem/1.6 var(--sans);overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
.page{max-width:74rem;margin:0 auto;padding:0 clamp(1rem,4vw,2.5rem) 4rem}
h1,h2,h3,p,dl,dd,ol,ul,figure{margin:0;padding:0}
h1,h2,h3{line-height:1.2;font-weight:650;text-wrap:balance;letter-spacing:-.012em}
h1{font-size:clamp(1.9rem,1.4rem + 2.4vw,2.75rem)}
h2{font-size:clamp(1.45rem,1.2rem + 1vw,1.8rem)}
h3{font-size:1.0625rem}
p,dd,li{max-width:68ch}
a{color:var(--accent);text-decoration-thickness:.06em;text-underline-offset:.2em}
a:hover{text-decoration-thickness:.12em}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:4px}
.skip{position:absolute;left:-999rem}
.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.5rem 1rem;z-index:2}
.top{padding:clamp(2.25rem,7vw,4.5rem) 0 clamp(1.5rem,4vw,2.5rem)}
.over{color:var(--soft);font-size:1rem;margin-bottom:.6rem}
.lede{color:var(--soft);margin-top:1rem;font-size:1.125rem;line-height:1.55}
main>section{margin-top:clamp(2.75rem,7vw,4.5rem)}
main>section:first-child{margin-top:0}
.result{border-top:1px solid var(--line);padding-top:clamp(1.75rem,4vw,2.5rem)}
.folder{font-family:var(--mono);font-size:1rem;color:var(--soft);margin-top:.45rem}
.what{margin-top:.9rem;font-size:1.125rem;line-height:1.55}
.plain{margin-top:.8rem}
#in-short h3{margin-top:2rem}
.claims{list-style:none;margin-top:.9rem;display:grid;gap:.7rem}
.claims>li{max-width:none}
.claim{margin:0}
.claim summary{display:grid;gap:.5rem 1.25rem;font-weight:400;padding:.9rem 1.1rem;list-style:none}
.claim summary::-webkit-details-marker{display:none}
.claim summary:hover .paper{text-decoration:underline;text-decoration-thickness:.06em;text-underline-offset:.2em}
.badges{display:flex;flex-wrap:wrap;gap:.4rem;align-content:start}
.claim .paper::after{content:"\\2060\\a0\\25b8";color:var(--soft)}
.claim[open] .paper::after{content:"\\2060\\a0\\25be"}
.claim .inside{list-style:none;display:grid;gap:1rem;padding:0 1.1rem 1.1rem}
.claim .inside li{border-top:1px solid var(--line);padding-top:1rem;max-width:none}
.claim .inside p{margin-top:.4rem}
.claim .from{font-size:1rem;color:var(--soft)}
.badge{display:inline-block;justify-self:start;padding:.1rem .7rem;border-radius:99px;font-size:1rem;font-weight:600;
white-space:nowrap;background:var(--open-bg);color:var(--open)}
.good{background:var(--good-bg);color:var(--good)}
.bad{background:var(--bad-bg);color:var(--bad)}
@media (min-width:56rem){.claim summary{grid-template-columns:13rem 1fr}.claim .inside li{display:grid;
grid-template-columns:13rem 1fr;gap:0 1.25rem}.claim .inside p{grid-column:2;margin:0}
.claim .inside .badge{grid-row:1/3;align-self:start}.claim .inside .from{margin-top:.25rem}.paper{max-width:68ch}}
@media (max-width:40rem){th,td{padding-left:.65rem;padding-right:.65rem}
th button{padding-left:.65rem;padding-right:.65rem;margin-left:-.65rem;margin-right:-.65rem}}
.contents ol{list-style:none;margin-top:1rem;display:grid;border-top:1px solid var(--line)}
.contents li{max-width:none;border-bottom:1px solid var(--line)}
.contents a{display:flex;
flex-wrap:wrap;justify-content:space-between;gap:0 1.5rem;padding:.65rem 0;text-decoration:none}
.contents a:hover span:first-child{text-decoration:underline}
.contents .where{font-family:var(--mono);font-size:1rem;color:var(--soft)}
.figure{margin-top:1.75rem;background:var(--figure);border:1px solid var(--line);border-radius:12px;overflow:hidden}
.figure+.figure{margin-top:1rem}
.scroll{overflow-x:auto;overscroll-behavior-x:contain;-webkit-overflow-scrolling:touch}
.figure .scroll{padding:1rem}
.figure svg{display:block;margin:0 auto;height:auto;stroke-linejoin:round;stroke-linecap:butt}
@media (min-width:60rem){.figure svg{max-width:100%}}
.figure figcaption{padding:0 1.25rem 1rem;color:var(--soft);font-size:1rem;line-height:1.45}
@media (prefers-color-scheme:dark){.figure svg{filter:invert(.898) hue-rotate(180deg)}}
.table{margin-top:2rem}
.table .scroll{margin-top:.7rem;background:var(--card);border:1px solid var(--line);border-radius:12px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:1rem;line-height:1.35}
th,td{padding:.6rem .75rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
overflow-wrap:break-word;max-width:24rem}
.middling{min-width:10rem}
.long{min-width:15rem;overflow-wrap:anywhere}
tbody tr:last-child>*{border-bottom:0}
thead th{background:var(--band);font-weight:600;vertical-align:bottom}
thead small{display:block;font-size:1rem;font-weight:400;color:var(--soft)}
tbody th{font-weight:500;background:var(--card);position:sticky;left:0;z-index:1;
min-width:7rem;max-width:min(24rem,46vw)}
tbody th.middling{min-width:min(10rem,40vw)}
tbody th.long{min-width:min(15rem,46vw)}
thead th:first-child{position:sticky;left:0;z-index:2}
tr.marked>*{background:var(--mark)}
tr.marked th{font-weight:650}
.n{text-align:right;white-space:nowrap;overflow-wrap:normal}
thead .n{white-space:normal}
table .aside{color:var(--soft);font-weight:400}
tbody th .aside{display:block}
td.none{color:var(--soft)}
.below{margin-top:.6rem;color:var(--soft);font-size:1rem;line-height:1.5}
th button{all:unset;display:block;
width:100%;cursor:pointer;padding:.6rem .75rem;margin:-.6rem -.75rem;box-sizing:content-box}
th button:focus-visible{outline:3px solid var(--accent);outline-offset:-3px}
th button:hover .name{text-decoration:underline;text-underline-offset:.2em}
th button .name::after{content:"\\2060\\a0\\2195";color:var(--soft);opacity:.55;font-weight:400}
th[aria-sort=ascending] .name::after{content:"\\2060\\a0\\2191";color:var(--accent);opacity:1}
th[aria-sort=descending] .name::after{content:"\\2060\\a0\\2193";color:var(--accent);opacity:1}
.facts{margin-top:1.75rem;display:grid;gap:.35rem 1.5rem}
.facts dt{color:var(--soft);font-size:1rem}
.facts dd{margin-bottom:.6rem}
@media (min-width:46rem){.facts{grid-template-columns:11rem 1fr}.facts dd{margin:0}}
.says{margin-top:2rem}
.says ul{list-style:none;display:grid;gap:.75rem;margin-top:.7rem}
.says li{padding-left:1rem;border-left:3px solid var(--line)}
.says.doubts li{border-left-color:var(--bad)}
details{margin-top:1rem;border:1px solid var(--line);border-radius:12px;background:var(--card)}
summary{cursor:pointer;padding:.75rem 1.1rem;font-weight:600}
summary small{font-size:1rem;font-weight:400;color:var(--soft)}
details>.inside{padding:0 1.1rem 1.1rem}
details .facts{margin-top:.25rem}
details .below{margin:0 0 .7rem}
.table+details,.says+details,.facts+details{margin-top:2rem}
details .scroll{border:1px solid var(--line);border-radius:8px;margin:0}
details.longer{margin-top:2rem}
.says+.table,.says+details{margin-top:2rem}
details .scroll tbody th{min-width:5rem}
pre{margin:0;font:1rem/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere}
footer{margin-top:4.5rem;border-top:1px solid var(--line);padding-top:1.25rem;color:var(--soft);font-size:1rem}
@media print{
:root{color-scheme:light;--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--band:#f2f2f0;--accent:#000;
--good:#0b6b4f;--good-bg:#fff;--bad:#9a3d06;--bad-bg:#fff;--open:#333;--open-bg:#fff;--mark:#f4f4f2;--figure:#fff}
@page{margin:15mm 14mm}
body{font-size:10.5pt;line-height:1.45}
.page{max-width:none;padding:0}
.skip{display:none}
.top{padding:0 0 6mm}
h1{font-size:22pt}h2{font-size:15pt}h3{font-size:11pt}
.lede,.what{font-size:11pt}
p,dd,li,.claim .from,.below,.facts dt,.over,.folder,footer,summary,summary small,figcaption{font-size:10pt}
main>section{margin-top:9mm}
h1,h2,h3,summary,.result>header{break-after:avoid}
.claim .inside li,.figure,tr,.says li,.facts dd,.contents li,.result>header{break-inside:avoid}
p,dd,li{max-width:none}
thead{display:table-header-group}
.scroll{overflow:visible}
.figure{border:0;border-radius:0}
.figure .scroll{padding:0}
.figure svg{max-width:100%;filter:none}
.figure figcaption{padding:2mm 0 0;font-size:9pt}
.badge{font-size:9pt;padding:0 2mm}
.table .scroll,details .scroll,details{border-radius:0;border-width:0;background:none}
table,thead small{font-size:8.5pt}
th,td{padding:1.1mm 1.6mm;min-width:0;max-width:none}
tbody th,thead th:first-child,.middling,.long{position:static;min-width:0!important;max-width:none}
.n{white-space:normal}
.n .aside{white-space:nowrap}
th button .name::after{content:none}
.badge{border:1px solid currentColor}
summary{padding:0;list-style:none}
details>.inside{padding:0}
details.made::details-content,details.longer::details-content,
details.claim::details-content{content-visibility:visible;display:block;height:auto}
.claim .paper::after{content:none!important}
details.rows:not([open]){display:none}
details.rows table,details.rows small,pre{font-size:7pt}
a{text-decoration:none}
}
"""

SCRIPT = """
(() => {
  "use strict";
  const key = (row, at) => {
    const cell = row.cells[at];
    if (cell.dataset.v !== undefined) return Number(cell.dataset.v);
    return cell.textContent.trim();
  };
  const rank = (value) => (typeof value === "number" ? 0 : value === "" ? 2 : 1);
  const compare = (a, b, sign) => {
    if (rank(a) !== rank(b)) return rank(a) - rank(b);
    if (typeof a === "number") return a === b ? 0 : sign * (a < b ? -1 : 1);
    return sign * a.localeCompare(b, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    if (original.length < 2) continue;
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, at) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const now = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", now);
        const rows = [...original];
        if (now !== "none") {
          const sign = now === "ascending" ? 1 : -1;
          rows.sort((a, b) => compare(key(a, at), key(b, at), sign));
        }
        body.append(...rows);
      });
    });
  }
})();
"""
