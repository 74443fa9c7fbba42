"""The page of the service in a real browser: Debian's Chromium, driven by Playwright. Skipped where either is missing, unless BLOCKS_BROWSER=1."""
import base64, csv, hashlib, io, json, os, re, shutil, threading, time
from contextlib import contextmanager
from pathlib import Path
import elpv_dataset
import pytest
import torch
from PIL import Image
from torch import nn

DATA = Path(elpv_dataset.__file__).parent/'data'
KINDS = {Path(f).name: kind for f, _, kind in (line.split() for line in (DATA/'labels.csv').read_text().splitlines())}
MONO, POLY = [[DATA/'images'/name for name in [n for n, k in KINDS.items() if k == kind][:8]] for kind in ('mono', 'poly')]
STRICT = "default-src 'none'; img-src 'self' blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
MOST = 2*2**20      # bytes that the service of these tests takes


class Corners(nn.Module):
    "Mono or poly: a single crystal is cut from a round ingot, so the corners of its cell are dark"
    def forward(self, x):
        c = x.shape[-1]//12
        corners = torch.stack([x[..., i, j].mean((1, 2, 3)) for i in (slice(c), slice(-c, None)) for j in (slice(c), slice(-c, None))]).mean(0)
        score = 20*(corners/x.mean((1, 2, 3)).clamp(min=1e-3) - .6)
        return torch.stack([-score, score], 1)


@pytest.fixture(scope='module')
def predictor():
    from blocks.data.block import ImageBlock
    from blocks.data.frame import Resize
    from blocks.data.label import CategoryBlock
    from blocks.infer.predictor import Predictor
    info = dict(classes=['mono', 'poly'], metrics={'valid_loss': .12, 'accuracy': .9731}, items={'train': 1968, 'valid': 656}, architecture='Corners', trained='2026-05-03T10:00:00+00:00',
                epochs=3, input='96×96 RGB', card='# Solar cells\n\nTells **mono** from poly.\n\n- corners\n- <img src=x onerror="alert(1)">\n')
    return Predictor(Corners(), (ImageBlock(), CategoryBlock(vocab=['mono', 'poly'])), geometries=(Resize(96),), device='cpu', info=info)


def lacking(problem):
    (pytest.fail if os.environ.get('BLOCKS_BROWSER') == '1' else pytest.skip)(problem)


@pytest.fixture(scope='module')
def serving():
    "Starts an app on a free port of the loopback, each in a thread; all end with the module"
    try: import fastapi, python_multipart, uvicorn     # noqa: F401
    except ImportError as e: lacking(f'no {e.name}')
    started = []
    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, host='127.0.0.1', port=0, log_level='warning'))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        started.append((server, thread))
        until = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < until and thread.is_alive(), 'the service did not start'
            time.sleep(.01)
        return f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/'
    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope='module')
def service(serving, predictor):
    from blocks.app.serve import Limits, create_app
    return serving(create_app(predictor, limits=Limits(max_bytes=MOST)))


@pytest.fixture(scope='module')
def browser():
    try: from playwright.sync_api import sync_playwright
    except ImportError: lacking('no Playwright')
    program = shutil.which('chromium')
    if program is None: lacking('no chromium')
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=['--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'])
        yield browser
        browser.close()


@contextmanager
def tab(browser, **options):
    "A new tab, and the lists of what it complains about and of the addresses it asks for"
    context = browser.new_context(**options)
    context.set_default_timeout(8000)
    page, problems, asked = context.new_page(), [], []
    page.on('console', lambda m: problems.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: problems.append(str(e)))
    page.on('dialog', lambda d: (problems.append(f'a script ran: {d.message}'), d.dismiss()))
    page.on('request', lambda r: asked.append(r.url))
    yield page, problems, asked
    context.close()


@contextmanager
def visit(page, problems, asked, url, expected=()):
    "Open the page, and see at the end that nothing went wrong, but what was `expected`, and that nothing was asked of another place"
    problems.clear(), asked.clear()
    page.route(url, only_its_own)
    page.goto(url)
    until(page, 'document.getElementById("limits").textContent || document.getElementById("note").textContent')
    yield page
    page.evaluate('clear()')
    page.unroute_all()
    assert [p for p in problems if not any(e in p for e in expected)] == []
    assert asked and all(u.startswith((url, 'blob:', 'data:')) for u in asked), asked


@contextmanager
def opened(browser, url, **options):
    with tab(browser, **options) as (page, problems, asked), visit(page, problems, asked, url): yield page


def only_its_own(route):
    "The page under a stricter policy than its own: nothing but its very script and style may run"
    answer = route.fetch()
    text = answer.text()
    script, style = (base64.b64encode(hashlib.sha256(re.search(f'<{t}>(.*?)</{t}>', text, re.S)[1].encode()).digest()).decode() for t in ('script', 'style'))
    route.fulfill(response=answer, headers={**answer.headers, 'content-security-policy': f"{STRICT}; script-src 'sha256-{script}'; style-src 'sha256-{style}'"})


@pytest.fixture(scope='module')
def one_tab(browser):
    with tab(browser) as opened: yield opened

@pytest.fixture
def expected():
    "What the browser may complain about in a test: answers that refuse are errors in its console"
    return []

@pytest.fixture
def page(one_tab, service, expected):
    "The page, opened afresh, in a tab that all tests share"
    with visit(*one_tab, service, expected) as page: yield page


def until(page, what, arg=None, seconds=8):
    "Wait until the JavaScript `what` is true; asked from outside, since Playwright's own waiting needs eval, which the policy forbids"
    end = time.monotonic() + seconds
    while not page.evaluate(what, arg):
        assert time.monotonic() < end, f'{what} {arg} did not come true in {seconds} s: {page.locator("main").text_content()[:400]}'
        page.wait_for_timeout(15)

def wait(page, n, state='done'):
    "The `n` cards of that state once they are there, and the counts that are drawn one frame later"
    until(page, '([n, s]) => document.querySelectorAll(`.card.${s}`).length === n', [n, state])
    page.evaluate('() => new Promise(drawn => requestAnimationFrame(() => drawn()))')
    return page.locator(f'.card.{state}')

def choose(page, *files):
    "Choose files: paths, or (name, type, bytes)"
    named = [(f.name, 'image/png', f.read_bytes()) if isinstance(f, Path) else f for f in files]
    page.set_input_files('#files', [dict(name=n, mimeType=t, buffer=b) for n, t, b in named])

def transfer(page, *files):
    "A DataTransfer in the page with (name, type, bytes)"
    return page.evaluate_handle('''files => { const t = new DataTransfer()
        for (const [name, type, data] of files) t.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, { type }))
        return t }''', [[n, t, base64.b64encode(b).decode()] for n, t, b in files])

def png(size=(32, 24), colour=(90, 120, 60)):
    out = io.BytesIO()
    Image.new('RGB', size, colour).save(out, 'png')
    return out.getvalue()

def answer_with(page, prediction):
    "Let the service answer every picture with this"
    page.route('**/predict?*', lambda route: route.fulfill(json={'predictions': [prediction]}))


def test_the_head_tells_about_the_model(page):
    assert page.locator('h1').text_content() == page.title() == 'Corners'
    assert '2 classes' in page.locator('#about').text_content() and '1,968 pictures' in page.locator('#about').text_content()
    assert page.locator('#classes li').all_text_contents() == ['mono', 'poly'] and page.locator('#metrics').text_content() == 'accuracy 0.9731'
    assert not page.locator('#card .prose').is_visible()
    page.click('#card summary')
    assert page.locator('#card h3').text_content() == 'Solar cells' and page.locator('#card strong').text_content() == 'mono'
    assert page.locator('#card li').all_text_contents() == ['corners', '<img src=x onerror="alert(1)">'] and page.locator('#card img').count() == 0
    assert 'only to this server' in page.locator('footer').text_content()


def test_one_picture(page, predictor):
    choose(page, MONO[0])
    card = wait(page, 1).first
    label, index, probs = predictor.predict(MONO[0])
    assert label == 'mono' and card.locator('.label span').text_content() == 'mono'
    assert card.locator('.label small').text_content() == f'{float(probs[index])*100:.1f} %'
    assert card.locator('.bars li > span').all_text_contents() == ['mono', f'{float(probs[0])*100:.1f} %', 'poly', f'{float(probs[1])*100:.1f} %']
    widths = card.locator('.track').evaluate_all('tracks => tracks.map(t => t.firstChild.offsetWidth / t.offsetWidth)')
    assert widths == pytest.approx(probs.tolist(), abs=.02)
    img = card.locator('img')
    assert img.evaluate('i => i.complete && [i.naturalWidth, i.naturalHeight]') == [300, 300] and img.get_attribute('alt') == MONO[0].name
    until(page, 'document.getElementById("heard").textContent.includes("mono")')


def test_several_pictures(page):
    files = MONO[:4] + POLY[:4]
    choose(page, *files)
    found = wait(page, 8)
    assert found.locator('.file span').all_text_contents() == [f.name for f in files]
    assert found.locator('.label span').all_text_contents() == ['mono']*4 + ['poly']*4
    until(page, 'document.getElementById("count").textContent === "8 pictures answered"')
    found.first.locator('.bare').click()
    assert page.locator('.card.done').count() == 7 and page.evaluate('document.activeElement.ariaLabel') == f'Remove {files[1].name}'


def test_what_cannot_be_answered_says_why(page, expected):
    expected += ['status of 4']
    sent = []
    page.on('request', lambda r: sent.append(r.url) if 'predict' in r.url else None)
    choose(page, ('large.png', 'image/png', bytes(MOST + 1)), ('empty.png', 'image/png', b''))
    large, empty = wait(page, 2, 'error').all()
    assert 'at most 2 MB' in large.text_content() and page.locator('#limits').text_content() == 'Up to 2 MB in a request' and 'has 2.1 MB' in large.text_content() and 'is empty' in empty.text_content() and not sent
    with page.expect_response('**/predict?*') as answer: choose(page, ('words.png', 'image/png', b'these are words\n'*20))
    text = answer.value.json()['error']
    card = wait(page, 3, 'error').first
    assert answer.value.status in (400, 415, 422) and card.locator('.state').text_content() == text and card.locator('.again').count() == 0
    assert 'no preview' in card.text_content()
    choose(page, POLY[0])
    assert wait(page, 1).locator('.label span').text_content() == 'poly'
    until(page, 'document.getElementById("count").textContent === "1 picture answered, 3 failed"')


def test_paste_and_drop(page):
    pasted = transfer(page, ('image.png', 'image/png', POLY[1].read_bytes()))
    page.evaluate('data => dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }))', pasted)
    card = wait(page, 1).first
    assert card.locator('.label span').text_content() == 'poly' and card.locator('.file span').text_content().startswith('pasted ')
    files = transfer(page, *[(f.name, 'image/png', f.read_bytes()) for f in (MONO[1], POLY[2])])
    page.dispatch_event('#add', 'dragover', {'dataTransfer': files})
    assert 'over' in page.get_attribute('body', 'class')
    page.dispatch_event('#add', 'drop', {'dataTransfer': files})
    assert wait(page, 3).locator('.label span').all_text_contents() == ['mono', 'poly', 'poly'] and not page.get_attribute('body', 'class')
    page.dispatch_event('#add', 'drop', {'dataTransfer': page.evaluate_handle('() => { const t = new DataTransfer(); t.setData("text/plain", "words"); return t }')})
    page.wait_for_selector('#note:visible')
    assert 'no picture file' in page.locator('#note').text_content()


def test_a_folder_is_dropped(page, tmp_path):
    "A real drop, of a folder with pictures, one of them deeper, and another file; and of files beside it"
    (tmp_path/'cells'/'more').mkdir(parents=True)
    for file, place in ((MONO[0], 'cells/a.png'), (POLY[0], 'cells/more/b.png'), (MONO[1], 'c.png')): shutil.copy(file, tmp_path/place)
    (tmp_path/'cells'/'notes.txt').write_text('words')
    session, (x, y) = page.context.new_cdp_session(page), page.locator('#add').evaluate('n => { const r = n.getBoundingClientRect(); return [r.x + 50, r.y + 20] }')
    for kind in ('dragEnter', 'dragOver', 'drop'):
        session.send('Input.dispatchDragEvent', dict(type=kind, x=x, y=y, data=dict(items=[], files=[str(tmp_path/'cells'), str(tmp_path/'c.png')], dragOperationsMask=1)))
    found = wait(page, 3)
    assert dict(zip(found.locator('.file span').all_text_contents(), found.locator('.label span').all_text_contents())) == {'a.png': 'mono', 'b.png': 'poly', 'c.png': 'mono'}
    assert page.locator('.card').count() == 3


def test_camera(page):
    page.click('#camera')
    page.wait_for_selector('#shoot:enabled')
    page.click('#shoot')
    page.click('#shoot')
    wait(page, 2)
    assert page.locator('#taken').text_content() == '2 pictures taken' and page.locator('.card.done').first.locator('.label').text_content()
    page.keyboard.press('Escape')
    until(page, '!document.querySelector("video").srcObject && document.activeElement.id === "camera"')
    w, h = page.locator('.card.done').first.locator('img').evaluate('i => [i.naturalWidth, i.naturalHeight]')
    assert min(w, h) >= 240


def test_camera_that_is_not_there(page):
    page.evaluate('() => { navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("", "NotAllowedError") } }')
    page.click('#camera')
    page.wait_for_selector('#note:visible')
    assert 'allow it for this page' in page.locator('#note').text_content() and not page.locator('#lens').is_visible()
    page.evaluate('Object.defineProperty(navigator, "mediaDevices", { value: undefined })')     # as on a connection that is not safe
    with page.expect_file_chooser() as chooser: page.click('#camera')
    chooser.value.set_files(str(MONO[0]))
    assert wait(page, 1).locator('.label span').text_content() == 'mono' and page.get_attribute('#shot', 'capture') == 'environment'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_on_a_phone(browser, service, scheme):
    with opened(browser, service, viewport={'width': 360, 'height': 740}, has_touch=True, is_mobile=True, device_scale_factor=2, color_scheme=scheme) as page:
        choose(page, MONO[2], ('x'*120 + '.png', 'image/png', POLY[3].read_bytes()))
        wait(page, 2)
        assert page.evaluate('document.documentElement.scrollWidth') <= 360
        small = page.evaluate('''() => [...document.querySelectorAll("button, summary, footer a")].filter(b => b.offsetParent)
            .map(b => [b.textContent, b.getBoundingClientRect()]).filter(([, r]) => r.width < 44 || r.height < 44).map(([t]) => t)''')
        assert small == []
        assert page.evaluate(CONTRAST) == []

# texts whose contrast with what lies behind them is below 4.5 (WCAG AA)
CONTRAST = '''() => {
  const channels = c => c.match(/[0-9.]+/g).map(Number), light = c => { const [r, g, b] = channels(c).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const behind = n => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor; if (c.startsWith("rgb(")) return c } return "rgb(255,255,255)" }
  const low = []
  for (const n of document.querySelectorAll("body *")) {
    if (!n.offsetParent || ![...n.childNodes].some(t => t.nodeType === 3 && t.data.trim())) continue
    const [a, b] = [light(getComputedStyle(n).color), light(behind(n))].sort((x, y) => y - x)
    if ((a + .05) / (b + .05) < 4.5) low.push(n.textContent)
  }
  return low }'''


def test_names_are_text_and_never_html(page):
    evil = '<img src=x onerror=alert(1)>.png'
    page.evaluate('localStorage.setItem("blocks answers /", JSON.stringify([{ name: "<img src=x onerror=alert(3)>", answer: "<svg onload=alert(4)>", thumb: "javascript:alert(5)", model: "<b>", time: "2026-01-01" }]))')
    answer_with(page, {'item': evil, 'kind': 'category', 'label': '<script>alert(2)</script>', 'probability': .9, 'top': [{'label': '<script>alert(2)</script>', 'probability': .9}, {'label': '<b>bold</b>', 'probability': .1}],
                       'objects': [{'box': [1, 1, 20, 20], 'label': '<img src=x onerror=alert(6)>', 'score': .9}], 'counts': {'<img src=x onerror=alert(6)>': 1}})
    page.evaluate('history.replaceState(null, "", location.href); recall()')
    page.evaluate('data => dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, cancelable: true }))', transfer(page, (evil, 'image/png', png())))
    card = wait(page, 1).first
    assert card.locator('.file span').text_content() == evil and card.locator('.tag').text_content() == '<img src=x onerror=alert(6)> 90.0 %'
    assert card.locator('.bars li > span').all_text_contents()[::2] == ['<script>alert(2)</script>', '<b>bold</b>']
    assert page.locator('#earlier li > span').nth(1).text_content() == '<svg onload=alert(4)>' and page.locator('#earlier img').count() == 0
    assert page.locator('img[src=x], .card script, .card b, #earlier b').count() == 0
    page.wait_for_timeout(50)       # an alert would be heard by now


def test_a_pipeline_draws_boxes(browser, serving, predictor):
    from blocks.app.serve import create_app

    class Annotated:
        objects = [{'box': [30, 60, 150, 240], 'score': .98, 'label': 'mono', 'probability': .91}, {'box': [180, 15, 270, 120], 'score': .9, 'label': 'unknown', 'probability': .4},
                   {'box': [200, 200, 280, 280], 'score': .9, 'label': 'mono', 'probability': .8}]
        counts = {'mono': 2, 'unknown': 1}
        image = Image.new('RGB', (300, 300))
        def to_dict(self): return {'objects': self.objects, 'counts': self.counts}
    class Stand:
        def annotate(self, img): return Annotated()
    with opened(browser, serving(create_app(predictor, pipeline=Stand()))) as page:
        choose(page, MONO[0])
        card = wait(page, 1).first
        assert card.locator('.counts li').all_text_contents() == ['mono 2', 'unknown 1']
        assert sorted(card.locator('.tag').all_text_contents()) == ['mono 80.0 %', 'mono 91.0 %', 'unknown 40.0 %']
        places = card.locator('.box').evaluate_all('''boxes => boxes.map(b => { const r = b.getBoundingClientRect(), p = b.parentElement.getBoundingClientRect()
            return [r.left - p.left, r.top - p.top, r.right - p.left, r.bottom - p.top].map(v => v / p.width * 300) })''')
        assert sorted(places) == [pytest.approx(o['box'], abs=1) for o in Annotated.objects]
        of_mono, of_unknown = [{c for c in card.locator('.box', has_text=name).evaluate_all('b => b.map(n => getComputedStyle(n).borderTopColor)')} for name in ('mono', 'unknown')]
        assert len(of_mono) == len(of_unknown) == 1 and of_mono != of_unknown


ANSWERS = [
    ({'kind': 'category', 'label': 'unknown', 'probability': .4, 'top': [{'label': 'mono', 'probability': .4}, {'label': 'poly', 'probability': .3}]}, '.label.unknown', ['unknown40.0 %']),
    ({'kind': 'category', 'label': 'unknown', 'probability': .9, 'top': [{'label': 'unknown', 'probability': .9}]}, '.label:not(.unknown)', ['unknown90.0 %']),
    ({'kind': 'category', 'label': 'sky', 'probability': .99999, 'top': [{'label': 'sky', 'probability': .99999}, {'label': 'sea', 'probability': .00001}]}, '.bars li', ['sky> 99.9 %', 'sea< 0.1 %']),
    ({'kind': 'multi', 'labels': ['sky', 'sea'], 'top': [{'label': 'sky', 'probability': .9}, {'label': 'sea', 'probability': .7}]}, '.label', ['sky, sea']),
    ({'kind': 'multi', 'labels': [], 'top': [{'label': 'sky', 'probability': .2}]}, '.label.unknown', ['none of the labels']),
    ({'kind': 'number', 'value': 3.14159}, '.label', ['3.142']),
    ({'kind': 'number', 'value': [1, -2.5]}, '.label', ['1, -2.5']),
    ({'kind': 'points', 'points': [[8, 6], [16, 12]]}, '.label', ['2 points']),
    ({'kind': 'mask', 'shares': {'sea': .25, 'sky': .75}}, '.bars li', ['sky75.0 %', 'sea25.0 %']),
    ({'kind': 'boxes', 'boxes': [{'box': [0, 0, 16, 12], 'label': 'car', 'score': .9}, {'box': [16, 12, 32, 24], 'label': 'car', 'score': .8}]}, '.counts li', ['car 2']),
    ({'kind': 'boxes', 'boxes': []}, '.label.unknown', ['nothing found']),
    ({'objects': [], 'counts': {}}, '.label.unknown', ['nothing found']),
    ({'error': 'ImageBlock.read failed for item 0: it is cut off'}, '.state', ['ImageBlock.read failed for item 0: it is cut off']),
]

def test_answers_of_every_kind(page):
    for i, (prediction, where, texts) in enumerate(ANSWERS):
        answer_with(page, {'item': f'{i}.png', **prediction})
        choose(page, (f'{i}.png', 'image/png', png()))
        until(page, 'n => document.querySelectorAll(".card.done, .card.error").length === n', i + 1)
        assert page.locator('.card').first.locator(where).all_text_contents() == texts, prediction
        page.unroute('**/predict?*')
    points = page.locator('.card').filter(has_text='2 points')
    at = points.locator('.point').evaluate_all('''dots => dots.map(d => { const r = d.getBoundingClientRect(), p = d.parentElement.getBoundingClientRect()
        return [(r.left + r.width / 2 - p.left) / p.width * 32, (r.top + r.height / 2 - p.top) / p.height * 24] })''')
    assert at == [pytest.approx([8, 6], abs=.3), pytest.approx([16, 12], abs=.3)]


def test_upright_picture(page):
    "Boxes are in pixels of the upright picture, and the preview is turned by what EXIF says"
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (400, 200), 'navy').save(out, 'jpeg', exif=exif)
    answer_with(page, {'kind': 'boxes', 'boxes': [{'box': [100, 200, 200, 400], 'label': 'car', 'score': .9}]})
    choose(page, ('turned.jpg', 'image/jpeg', out.getvalue()))
    share = wait(page, 1).first.locator('.box').evaluate('b => { const p = b.parentElement.getBoundingClientRect(); return [p.width / p.height, b.offsetLeft / p.width, b.offsetTop / p.height] }')
    assert share == pytest.approx([.5, .5, .5], abs=.02)


def test_no_network_then_again(page, expected):
    expected += ['ERR_FAILED']
    page.route('**/predict?*', lambda route: route.abort())
    choose(page, MONO[0], POLY[0])
    found = wait(page, 2, 'error')
    assert 'cannot be reached' in found.first.text_content() and page.locator('#again').text_content() == 'Try 2 again'
    page.unroute('**/predict?*')
    found.first.locator('.again').click()
    assert wait(page, 1).locator('.label span').text_content() == 'mono'
    wait(page, 1, 'error').locator('.again').click()
    wait(page, 2)
    assert not page.locator('#again').is_visible()


def test_a_service_that_comes_late(page, expected):
    expected += ['ERR_FAILED']
    for path in ('info', 'predict?*'): page.route(f'**/{path}', lambda route: route.abort())
    page.reload()
    page.locator('#note').wait_for()
    assert 'cannot be reached' in page.locator('#note').text_content()
    choose(page, MONO[0])
    card = wait(page, 1, 'error')
    for path in ('info', 'predict?*'): page.unroute(f'**/{path}')
    card.locator('.again').click()
    wait(page, 1)
    assert page.locator('h1').text_content() == 'Corners' and not page.locator('#note').is_visible()


def test_a_busy_service_is_asked_again_but_not_for_ever(page, expected):
    expected += ['status of 503']
    tries = []
    def busy(route):
        tries.append(time.monotonic())
        route.fulfill(status=503, headers={'Retry-After': '0.3' if len(tries) < 3 else '0'}, json={'error': 'Too many pictures wait: send it again later'}) if len(tries) < 3 or 3 < len(tries) < 20 else route.continue_()
    page.route('**/predict?*', busy)
    choose(page, MONO[0])
    assert wait(page, 1).locator('.label span').text_content() == 'mono' and len(tries) == 3 and tries[1] - tries[0] >= .25
    choose(page, POLY[0])
    card = wait(page, 1, 'error')
    assert len(tries) == 9 and 'Too many pictures wait' in card.text_content() and card.locator('.again').count() == 1


def test_many_at_once(page):
    page.evaluate('''() => { window.held = new Set(); const [make, free] = [URL.createObjectURL, URL.revokeObjectURL]
        URL.createObjectURL = o => { const u = make(o); held.add(u); return u }; URL.revokeObjectURL = u => { held.delete(u); free(u) }
        window.atOnce = [0, 0]; const ask = window.fetch; window.fetch = async (...a) => { atOnce[0]++; atOnce[1] = Math.max(...atOnce); try { return await ask(...a) } finally { atOnce[0]-- } } }''')
    small = Image.open(MONO[0]).resize((60, 60))
    out = io.BytesIO(); small.save(out, 'png')
    page.dispatch_event('#add', 'drop', {'dataTransfer': transfer(page, *[(f'{i}.png', 'image/png', out.getvalue()) for i in range(90)])})
    assert page.locator('.card').count() == 90 and page.locator('.card.done').count() < 90      # the cards are there before the answers
    wait(page, 90)
    assert page.evaluate('atOnce[1]') in (2, 3, 4) and page.evaluate('held.size') == 90
    assert page.locator('.card').first.locator('.file span').text_content() == '0.png'
    page.wait_for_timeout(500)      # the history is written a little later
    assert page.evaluate('JSON.parse(localStorage.getItem("blocks answers /")).length') == 50
    page.click('#clear')
    assert page.locator('.card').count() == 0 and page.evaluate('held.size') == 0 and page.evaluate('localStorage.length') == 0


def test_large_pictures_are_shrunk_for_the_preview(page):
    choose(page, ('large.png', 'image/png', png((2600, 1300))))
    assert wait(page, 1).locator('img').evaluate('i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])') == [1280, 640]


def read_csv(page):
    with page.expect_download() as download: page.click('#csv')
    text = Path(download.value.path()).read_text('utf-8-sig')
    return list(csv.DictReader(io.StringIO(text))), download.value.suggested_filename


def test_history_and_csv(page, service):
    assert not page.locator('#bar').is_visible()
    choose(page, ('=cmd"|x.png', 'image/png', MONO[0].read_bytes()), POLY[0], ('empty.png', 'image/png', b''))
    wait(page, 2), wait(page, 1, 'error')
    rows, name = read_csv(page)
    assert name == 'answers.csv' and [r['item'] for r in rows] == ['\'=cmd"|x.png', POLY[0].name, 'empty.png'] and [r['answer'] for r in rows] == ['mono', 'poly', '']
    assert float(rows[0]['probability']) > .5 and 'poly' in rows[0]['details'] and 'empty' in rows[2]['error'] and rows[0]['model'].startswith('Corners')
    page.reload()
    page.wait_for_selector('#earlier li')
    assert page.locator('.card').count() == 0 and page.locator('#earlier li > span:nth-of-type(1)').all_text_contents() == ['poly', 'mono']
    assert page.locator('#earlier img').evaluate_all('imgs => imgs.map(i => i.src.startsWith("data:image/jpeg") && i.src.length < 8000)') == [True, True]
    assert [r['answer'] for r in read_csv(page)[0]] == ['poly', 'mono']
    page.click('#clear')
    assert not page.locator('#earlier').is_visible()
    page.reload()
    until(page, 'document.getElementById("limits").textContent')
    assert not page.locator('#earlier').is_visible() and not page.locator('#bar').is_visible()


def test_without_storage_the_page_works(browser, service):
    with opened(browser, service) as page:
        page.add_init_script('Object.defineProperty(window, "localStorage", { get() { throw new DOMException("shut", "SecurityError") } })')
        page.reload()
        choose(page, MONO[0])
        wait(page, 1)
        assert len(read_csv(page)[0]) == 1


def test_behind_the_path_of_a_proxy(browser, service):
    with tab(browser) as (page, problems, asked):
        page.route('**/under**', lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace('/under', '', 1))))
        for under in ('under/', 'under'):
            page.goto(service + under)
            choose(page, MONO[0])
            assert wait(page, 1).locator('.label span').text_content() == 'mono'
        assert problems == [] and {u.split('?')[0] for u in asked if u.startswith('http')} == {f'{service}under{rest}' for rest in ('', '/', '/info', '/predict')}


def test_under_the_policy_of_the_service(browser, service):
    with tab(browser) as (page, problems, asked):
        answer = page.goto(service)
        choose(page, MONO[0])
        wait(page, 1)
        assert problems == [] and 'default-src' in answer.headers.get('content-security-policy', '')


def test_keyboard_and_names_for_screen_readers(page):
    choose(page, MONO[0])
    wait(page, 1)
    page.evaluate('document.activeElement.blur()')
    seen = []
    for _ in range(12):
        page.keyboard.press('Tab')
        seen.append(page.evaluate('''() => { const n = document.activeElement, s = getComputedStyle(n); return [n.ariaLabel || n.textContent, s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2] }'''))
    names = [name for name, _ in seen]
    assert {'Model card', 'Choose pictures', 'Use the camera', 'Download CSV', 'Clear', f'Remove {MONO[0].name}'} <= set(names)
    assert all(visible for name, visible in seen if name in ('Choose pictures', 'Clear', 'Model card'))
    unnamed = page.evaluate('''() => [...document.querySelectorAll("button, input, section, ul, ol, video, img, progress")].filter(n => n.offsetParent && !(n.ariaLabel || n.getAttribute("aria-labelledby") || n.alt || n.textContent.trim())).map(n => n.outerHTML)''')
    assert unnamed == [] and page.get_attribute('#heard', 'aria-live') == 'polite'


def test_the_page_is_one_file_of_its_own():
    import blocks.app
    text = (Path(blocks.app.__file__).parent/'page.html').read_text(encoding='utf-8')
    assert not re.search(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bstyle="|\son\w+="', text)
    assert not re.search(r'(?:src|href)="(?!data:)', text) and set(re.findall(r'https?://[^\s\'"]+', text)) <= {'http://www.w3.org/2000/svg'}
    assert text.count('<script') == text.count('<style') == 1 and json.dumps(text)
