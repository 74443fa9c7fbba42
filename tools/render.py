"""A notebook as a Markdown page: prose as it stands, code in ```python blocks, below them what it showed; pictures as files."""
import base64, json, os, re
from html.parser import HTMLParser
from pathlib import Path

DIRECTIVE = re.compile(r'^#[ \t]*\|[ \t]*([\w-]+)[ \t]*:?[ \t]*(.*)\n?', re.M)
FENCED = re.compile(r'(^```.*?^```|`[^`\n]+`)', re.M | re.S)

class Table(HTMLParser):
    "Collects the rows of an HTML table, each a list of the texts of its cells"
    def __init__(self, html):
        super().__init__()
        self.rows, self.cell = [], None
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('th', 'td'): self.cell = []
        if tag == 'br': self.handle_data(' ')
    def handle_endtag(self, tag):
        if tag in ('th', 'td') and self.cell is not None:
            self.rows[-1].append(' '.join(''.join(self.cell).split()).replace('|', r'\|')); self.cell = None
    def handle_data(self, data):
        if self.cell is not None: self.cell.append(data)

def markdown_table(html):
    "The table in `html` as a Markdown one; columns of numbers are set to the right"
    rows = [r for r in Table(html).rows if r]
    width = max(map(len, rows))
    head, *body = [r + ['']*(width-len(r)) for r in rows]
    number = [all(re.fullmatch(r'[-+\d.,:%e ]*', r[i]) for r in body) for i in range(width)]
    rule = ['---:' if n else '---' for n in number]
    return '\n'.join('| ' + ' | '.join(r) + ' |' for r in [head, rule, *body])

def fence(text, lang=''):
    marks = '````' if '```' in text else '```'
    return f'{marks}{lang}\n{text}\n{marks}'

def plain(text):
    "Printed text without colours, and without the lines that a progress bar wrote over"
    text = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', text).replace('\r\n', '\n')
    return fence(re.sub(r'[^\n]*\r', '', text).rstrip(), 'text') if text.strip() else ''

def joined(source): return source if isinstance(source, str) else ''.join(source)

def relinked(text, start, page):
    "`text` with its relative links, written as seen from folder `start`, as seen from folder `page`; code is left alone"
    def one(m):
        link, target = m.groups()
        if re.match(r'[a-z]+:|[#/]', target): return m[0]
        return link + Path(os.path.relpath(start/target, page)).as_posix()
    return ''.join(s if i % 2 else re.sub(r'(\]\(|src=")([^)"\s]+)', one, s) for i, s in enumerate(FENCED.split(text)))

def render_readme(
    notebook_path,    # the notebook to render; its pictures are saved in the folder `images` beside it
    readme_path,      # the Markdown file to write
):
    """Render a notebook to Markdown, the same bytes for the same notebook.

    Directives of a cell, as Quarto and nbdev write them: `#| hide` leaves it out, `#| echo: false` leaves out its code, `#| output: false` its outputs,
    `#| eval: false` marks its code as not run, `#| fig-alt: text` describes its picture. Other directives are dropped."""
    notebook, page = Path(notebook_path).resolve(), Path(readme_path).resolve()
    images, n_images = notebook.parent/'images', 0
    for old in images.glob('readme_*.png'): old.unlink()

    def picture(data, alt):
        nonlocal n_images
        n_images += 1
        images.mkdir(exist_ok=True)
        file = images/f'readme_{n_images}.png'
        file.write_bytes(base64.b64decode(joined(data)))
        return f'![{alt}]({Path(os.path.relpath(file, page.parent)).as_posix()})'

    def shown(out, alt):
        "One output, in the richest of its forms that Markdown can hold"
        if out['output_type'] == 'stream': return plain(joined(out['text'])) if out['name'] == 'stdout' else ''
        if out['output_type'] == 'error': raise ValueError(f'{notebook.name} holds an error: {out["ename"]}: {out["evalue"]}')
        data = out['data']
        if 'image/png' in data: return picture(data['image/png'], alt)
        html = joined(data.get('text/html', ''))
        if 'text/html' in data and not html.strip(): return ''                # what a finished progress bar leaves
        if '<tr' in html: return markdown_table(html)
        if 'text/markdown' in data: return joined(data['text/markdown']).strip()
        return plain(joined(data['text/plain'])) if 'text/plain' in data else html.strip()

    parts = [f'<!-- Rendered from {notebook.parent.name}/{notebook.name}: edit that, then `make readme` -->']
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = joined(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(relinked(source.strip(), notebook.parent, page.parent))
        if cell['cell_type'] != 'code': continue
        flags = {k: v.strip() for k, v in DIRECTIVE.findall(source)}
        code = DIRECTIVE.sub('', source).strip()
        if 'hide' in flags: continue
        if code and flags.get('echo') != 'false':
            parts.append(('<!-- not run -->\n' if flags.get('eval') == 'false' else '') + fence(code, 'python'))
        if flags.get('output') != 'false':
            parts += [shown(o, flags.get('fig-alt', 'what the code above shows')) for o in cell.get('outputs', [])]
    page.write_text('\n\n'.join(p for p in parts if p) + '\n', encoding='utf-8')
