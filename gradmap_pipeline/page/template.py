"""The page as a template of jinja2, and its styles. Nothing in it is loaded from elsewhere, and nothing in it runs."""

GENERATOR = '<meta name="generator" content="gradmap-pipeline report">'
"""Stands in every page, and in nothing else."""

STYLE = """\
:root{color-scheme:light dark;--ink:#1f2933;--soft:#5b6773;--line:#d9dfe5;--ground:#fff;--raised:#f5f7f9;
--good:#1b7a43;--bad:#b3263a;--warn:#8a5a00}
@media(prefers-color-scheme:dark){:root{
--ink:#e6eaee;--soft:#9fabb7;--line:#36404a;--ground:#14191e;--raised:#1d242b;--good:#6bd394;--bad:#ff8a98;--warn:#f0bf5f}}
@media print{:root{
color-scheme:light;--ink:#000;--soft:#444;--line:#bbb;--ground:#fff;--raised:#fff;--good:#1b7a43;--bad:#b3263a;--warn:#8a5a00}
h2{break-after:avoid}tr,svg,.tile,.answers div{break-inside:avoid}pre{white-space:pre-wrap}
details pre{columns:2}details::details-content{content-visibility:visible;block-size:auto}
body{font-size:10pt!important}main{padding:0!important}h1{font-size:16pt!important}h2{margin-top:18pt!important}
.wide{overflow:visible}.wide svg{min-width:0!important}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1040px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:40px 0 12px}
p{margin:0 0 12px}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.good,.bad,.warn{font-weight:600}
.note{border-left:4px solid var(--bad);background:var(--raised);padding:10px 14px;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:20px 0}
.tile{background:var(--raised);border:1px solid var(--line);border-radius:8px;padding:12px 16px}
.tile b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.9rem}
.wide{overflow-x:auto;margin:0 0 12px}.wide svg{display:block;min-width:680px;width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-size:.93rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:6px 22px 6px 0;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft)}
.number{text-align:right;white-space:nowrap}td:last-child,th:last-child{padding-right:0}
code,pre{font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}code{overflow-wrap:anywhere}
pre{background:var(--raised);border:1px solid var(--line);border-radius:8px;padding:12px 16px;overflow-x:auto;margin:0 0 12px}
.answers{display:grid;grid-template-columns:1fr 1fr;gap:12px;margin:0 0 20px}
.answers div{
background:var(--raised);border:1px solid var(--line);border-radius:8px;padding:10px 14px;
white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere}
.answers span{display:block;font-size:.85rem;white-space:normal}details{margin:0 0 12px}summary{cursor:pointer;color:var(--soft)}
footer{margin-top:48px;padding-top:12px;border-top:1px solid var(--line);color:var(--soft);font-size:.9rem}
@media(max-width:600px){
main{padding:16px 14px 48px}.answers{grid-template-columns:1fr}
th,td{padding-right:10px}table{font-size:.85rem}h1{font-size:1.35rem}}
"""

HEAD = """\
{%- macro table(rows) -%}
<div class="wide"><table><thead><tr>{% for heading in rows.headings %}\
<th{% if heading in rows.numbers %} class="number"{% endif %}>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows.rows %}<tr>{% for cell in row %}\
<td{% if rows.headings[loop.index0] in rows.numbers %} class="number"{% endif %}>\
{% if cell.kind == "code" %}<code>{{ cell.text }}</code>\
{% elif cell.kind %}<span class="{{ cell.kind }}">{{ cell.text }}</span>{% else %}{{ cell.text }}{% endif %}</td>\
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{{ generator }}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
"""
"""Up to the header of a page: the macro `table`; it takes `title`, `style` and `generator`."""

FOOT = """\
<footer>Made with {{ made_by }}, the tool around GradMAP (arXiv:2602.14649).
Every figure was recorded when it was computed.</footer>
</main>
</body>
</html>
"""
"""The end of a page; it takes `made_by`."""

PAGE = """\
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
{% if failure %}<p class="note"><span class="bad">A limit is missed.</span> {{ failure }}</p>{% endif %}
</header>
<div class="tiles">
{% for tile in tiles %}<div class="tile"><span>{{ tile.name }}</span><b>{{ tile.value }}</b><span>{{ tile.change }}</span></div>
{% endfor %}</div>
<section><h2>Layers</h2>
<div class="wide">{{ picture }}</div>
<p class="soft">Removed, counted from 0: {{ removed }}.</p>
{% if sites.rows %}<details><summary>{{ sites.rows | length }} places corrected</summary>
{{ table(sites) }}</details>{% endif %}
{% if patched %}<details><summary>{{ patched | length }} tensors differ from those of the unpruned model</summary>
<pre>{{ patched | join("\n") }}</pre></details>{% endif %}
</section>
{% for training in trainings %}<section><h2>Training</h2>
<div class="wide">{{ training.picture }}</div>
<p class="soft">{{ training.about }}</p>
</section>
{% endfor %}\
{% for part in parts %}{% if part.table.rows %}<section><h2>{{ part.heading }}</h2>
{% if part.about %}<p class="soft">{{ part.about }}</p>{% endif %}
{{ table(part.table) }}
</section>
{% endif %}{% endfor %}\
{% for group in answers %}<section><h2>Answers before and after</h2>
<p class="soft">{{ group.about }}</p>
{% for answer in group.answers %}<p class="prompt"><strong>{{ answer.prompt }}</strong></p>
<div class="answers"><div><span class="soft">before</span>\
{% if answer.base_repeats %}<span class="warn">Repeats itself.</span>{% endif %}{{ answer.base_answer }}</div>
<div><span class="soft">after</span>\
{% if answer.repeats %}<span class="warn">Repeats itself.</span>{% endif %}{{ answer.answer }}</div></div>
{% endfor %}</section>
{% endfor %}\
<section><h2>{{ recipe.heading }}</h2>
{% if recipe.about %}<p class="soft">{{ recipe.about }}</p>{% endif %}
<pre>{{ recipe.text }}</pre>
</section>
<section><h2>Where it was made</h2>
{{ table(environment) }}
</section>
{% if files.rows %}<section><h2>Files</h2>
{{ table(files) }}
</section>{% endif %}
"""
"""A run or an export, between head and foot."""

COMPARISON = """\
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
</header>
{% for picture in pictures %}<section><h2>{{ picture.title }}</h2>
<div class="wide">{{ picture.svg }}</div>
</section>
{% endfor %}\
<section><h2>Variants</h2>
{{ table(rows) }}
</section>
"""
"""Several variants, between head and foot."""
