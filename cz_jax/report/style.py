"""The report's style sheet: one set of names, a light and a dark set of values, from 320 pixels up."""

LIGHT = """
--bg:#f7f7f4;--card:#fff;--ink:#16181d;--soft:#4b515c;--faint:#6b727e;--rule:#e3e3dd;--grid:#ecece7;--code:#f4f4ef;
--accent:#2563c9;--hover:#16181d0d;
--c1:#2a6bd4;--c2:#d2690e;--c3:#0d8577;--c4:#7f47c4;--c5:#c0326a;--c6:#97710a;--c7:#8b919c;--c8:#4c8530;
--l1:#5a4ab3;--l2:#2f74c0;--l3:#128a8a;--l4:#4c9440;--l5:#b58900;"""
DARK = """
--bg:#0f1115;--card:#181b21;--ink:#eceef2;--soft:#b9bfca;--faint:#8f96a3;--rule:#2b2f38;--grid:#262a32;--code:#12141a;
--accent:#7fb0ff;--hover:#ffffff12;
--c1:#6ea6ff;--c2:#f39a50;--c3:#41c0ae;--c4:#b592f4;--c5:#f2789f;--c6:#d8b548;--c7:#7e8694;--c8:#8bc76f;
--l1:#8d80e0;--l2:#559ae6;--l3:#3fbdb8;--l4:#93d37e;--l5:#f2de6c;"""

SERIES = "".join(f".s{i}{{--k:var(--c{i})}}" for i in range(1, 9)) + "".join(
    f".l{i}{{--k:var(--l{i})}}" for i in range(1, 6)
)

STYLE = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
{SERIES}
.v1{{--k:var(--c3)}}.v2{{--k:var(--c2)}}.v3{{--k:var(--c7)}}.v4{{--k:var(--c5)}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-behavior:smooth}}
body{{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Noto Sans",sans-serif;font-variant-numeric:tabular-nums}}
main,header.top{{max-width:1140px;margin:0 auto;padding:0 32px}}
header.top{{padding-top:64px}}
.eyebrow{{margin:0;color:var(--faint);font-size:.8125rem;letter-spacing:.02em}}
h1{{font-size:clamp(1.7rem,4.4vw,2.75rem);line-height:1.14;letter-spacing:-.024em;font-weight:680;margin:.5rem 0 1rem;
max-width:24em;text-wrap:balance;overflow-wrap:anywhere}}
.lead{{font-size:1.0625rem;color:var(--soft);max-width:46em;margin:0;text-wrap:pretty}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:28px 24px;margin:44px 0 0;
padding:28px 0;border-top:1px solid var(--rule);border-bottom:1px solid var(--rule)}}
.tiles div{{min-width:0}}
.tiles dt{{font-size:.8125rem;color:var(--faint)}}
.tiles dd{{margin:.15rem 0 0;font-size:1.5rem;font-weight:640;letter-spacing:-.018em;line-height:1.25}}
.tiles dd small{{display:block;font-size:.8125rem;font-weight:400;letter-spacing:0;color:var(--faint);margin-top:.2rem}}
nav{{display:flex;flex-wrap:wrap;gap:6px 22px;margin:22px 0 0;font-size:.9rem}}
a{{color:var(--accent);text-decoration:none}}a:hover{{text-decoration:underline}}
h2{{font-size:1.45rem;letter-spacing:-.018em;line-height:1.25;margin:72px 0 6px;font-weight:660}}
h2+.about{{margin:0 0 24px}}
.about{{color:var(--soft);max-width:50em;margin:.2rem 0 1rem;font-size:.9375rem;text-wrap:pretty}}
.grid2{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:24px}}
.flow{{columns:2 440px;column-gap:24px}}.flow>*{{break-inside:avoid;margin:0 0 24px}}
.grid3{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:24px}}
.card{{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:24px 26px;min-width:0}}
.stack>*+*{{margin-top:24px}}
h3{{margin:0 0 .35rem;font-size:1.02rem;font-weight:640;letter-spacing:-.006em}}
.card .about{{font-size:.875rem;color:var(--faint);margin:0 0 1rem}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 16px;padding:0;font-size:.8125rem;
color:var(--soft)}}
.legend i{{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--k);margin-right:7px}}
.legend b{{color:var(--ink);font-weight:640}}
.plot{{display:block;overflow:visible;width:calc(100% - 52px);margin:8px 4px 30px 48px;font-size:12px}}
.plot.rows{{width:calc(100% - 122px);margin-left:108px}}
.plot svg{{overflow:visible}}.plot text{{fill:var(--faint);text-anchor:middle}}
.plot text.y,.plot text.end{{text-anchor:end}}.plot text.start{{text-anchor:start}}.plot text.row{{fill:var(--soft)}}
.grid{{stroke:var(--grid);stroke-width:1}}.base{{stroke:var(--faint);stroke-opacity:.55}}
.line{{fill:none;stroke:var(--k);stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round;
vector-effect:non-scaling-stroke}}
.line.raw{{stroke-width:1.25;stroke-opacity:.34}}.line.points{{stroke-width:7}}
.line.step{{stroke-linecap:butt;stroke-linejoin:miter;stroke-width:2.5}}
.bar{{fill:var(--k)}}.whisker{{stroke:var(--k);stroke-width:2.5;stroke-linecap:round;stroke-opacity:.55}}
.dot{{fill:var(--k);stroke:var(--card);stroke-width:1.5}}
.hit{{fill:transparent}}.hit:hover{{fill:var(--hover)}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-size:.875rem}}
th,td{{text-align:left;padding:7px 18px 7px 0;border-bottom:1px solid var(--grid);vertical-align:top}}
tr:last-child>*{{border-bottom:0}}
thead th{{color:var(--faint);font-weight:500;font-size:.8125rem;white-space:nowrap}}
tbody th{{font-weight:500;overflow-wrap:anywhere}}td{{overflow-wrap:anywhere}}
.figures th,.figures td{{white-space:nowrap}}.figures small{{color:var(--faint);font-size:.8125rem}}
.settings th{{width:40%}}.settings td{{width:30%}}.settings td{{font-family:var(--mono);font-size:.8125rem}}
.all{{columns:2 420px;column-gap:40px;margin-top:12px}}.all h4{{margin:0 0 4px}}.all>div{{break-inside:avoid;
margin:0 0 24px}}
:root{{--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}}
code,pre{{font-family:var(--mono)}}code{{font-size:.86em}}code[title]{{white-space:nowrap}}
pre{{margin:0;padding:16px 18px;border-radius:10px;background:var(--code);font-size:.8125rem;line-height:1.6;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:30rem;overflow-y:auto;unicode-bidi:isolate;tab-size:4}}
pre.question{{background:none;padding:0;margin:.55rem 0 1rem;font:inherit;font-size:1.0625rem;line-height:1.5;
max-height:22rem}}
.ctl,.cut{{color:var(--faint);background:var(--hover);border-radius:4px;padding:0 4px;font-size:.85em;
font-family:system-ui,sans-serif}}
details{{margin:.25rem 0}}summary{{cursor:pointer;color:var(--accent);font-size:.875rem;padding:4px 0}}
details>pre{{margin-top:8px}}
.chips{{display:flex;flex-wrap:wrap;gap:5px;align-items:center;margin:14px 0 18px;font-size:.8125rem;
color:var(--faint)}}
.chips span{{margin-left:8px}}.sub{{margin-top:20px}}
.chip{{width:14px;height:14px;border-radius:4px;background:var(--k)}}
.chip.v2,.chip.v4{{background:linear-gradient(135deg,var(--k) 42%,transparent 42% 58%,var(--k) 58%)}}
.pair{{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:24px}}
.answer header{{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:baseline}}
h4{{margin:0;font-size:.9375rem;font-weight:640}}
.verdict{{font-size:.8125rem;color:var(--soft);border-left:3px solid var(--k);padding-left:8px}}
.tag{{font-size:.75rem;color:var(--soft);border:1px solid var(--rule);border-radius:99px;padding:0 8px}}
.fine{{font-size:.8125rem;color:var(--faint);margin:.3rem 0 .7rem;overflow-wrap:anywhere}}.fine b{{color:var(--ink)}}
.task>.fine:last-child{{margin:18px 0 0}}
.note{{border-left:3px solid var(--c2);padding:8px 14px;margin:24px 0 0;color:var(--soft);font-size:.9rem;
background:var(--card);border-radius:0 8px 8px 0;overflow-wrap:anywhere}}
footer{{max-width:1140px;margin:72px auto 0;padding:24px 32px 64px;color:var(--faint);font-size:.8125rem}}
@media (max-width:720px){{
main,header.top,footer{{padding-left:18px;padding-right:18px}}header.top{{padding-top:36px}}
.tiles{{grid-template-columns:repeat(2,minmax(0,1fr));margin-top:32px;gap:22px 18px;padding:24px 0}}
.tiles dd{{font-size:1.25rem}}h2{{margin-top:56px;font-size:1.3rem}}
.card{{padding:18px 16px;border-radius:12px}}.pair{{grid-template-columns:minmax(0,1fr);gap:28px}}
.plot{{width:calc(100% - 44px);margin-left:42px;margin-right:2px}}
.plot.rows{{width:calc(100% - 98px);margin-left:88px}}pre{{padding:14px}}
.figures small{{display:block}}th,td{{padding-right:14px}}
}}
@media print{{body{{background:#fff}}.card{{break-inside:avoid}}pre{{max-height:none}}nav{{display:none}}}}
"""
