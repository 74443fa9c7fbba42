"""The script of the front page, word for word but for its paths, in a process of its own, with weights in torch's hub cache."""
import os
import subprocess
import sys
import textwrap

import pytest
import torch

SCRIPT = '''
from blocks import *
mask_datablock = DataBlock(get_items=get_image_files, get_y=parent_label, blocks=(ImageBlock, CategoryBlock),
    item_tfms=RandomResizedCrop(224, min_scale=0.3), splitter=RandomSplitter(valid_pct=0.2, seed=100), batch_tfms=aug_transforms(mult=2))
dls = mask_datablock.dataloaders(DATASET_PATH)
dls.show_batch()
learn = cnn_learner(dls, resnet34, metrics=error_rate)
learn.fine_tune(4)
learn.export()
print(learn.predict('path/to/your/image.jpg'))
print(load_learner('export.pkl').predict('path/to/your/image.jpg'))
'''


@pytest.mark.slow
def test_the_script_of_the_front_page(two_class, tmp_path):
    import torchvision
    from PIL import Image
    few = tmp_path/'data'
    for c in ('cat', 'dog'):
        (few/c).mkdir(parents=True)
        for i in range(8): os.link(two_class/c/f'{c}_{i}.png', few/c/f'{c}_{i}.png')
    (tmp_path/'path/to/your').mkdir(parents=True)
    Image.open(two_class/'dog'/'dog_9.png').save(tmp_path/'path/to/your/image.jpg')
    cache = tmp_path/'torch'/'hub'/'checkpoints'
    cache.mkdir(parents=True)
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), cache/'resnet34-b627a593.pth')
    code = f'import matplotlib; matplotlib.use("Agg")\nDATASET_PATH = {str(few)!r}\n' + textwrap.dedent(SCRIPT)
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'TORCH_HOME': str(tmp_path/'torch'), 'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9'})
    assert out.returncode == 0, out.stderr[-3000:]
    lines = out.stdout.splitlines()
    assert [o.split()[0] for o in lines[:-2]] == ['epoch', '0', 'epoch', '0', '1', '2', '3'] and 'error_rate' in lines[0]
    assert lines[-1].split(',')[0] == lines[-2].split(',')[0] and lines[-1].startswith(("('cat'", "('dog'"))
    assert (tmp_path/'export.pkl').is_file()
