# ruff: noqa: B018, E402
# %% [markdown]
# # Reconstructions from Python
# A notebook as a script: editors that know `# %%` show cells, and plain `python docs/notebook.py` runs it.

# %% A network that has learnt a little: the demo's, in its small form, in a few seconds.
from lightning.pytorch import Trainer

from lit_deconv.examples.demo import build_demo

demo = build_demo(small=True)
trainer = Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(demo.module, datamodule=demo.datamodule)
model = demo.module

# %% Some pictures that it has not learnt from.
import torch

images = torch.stack([demo.datamodule.val_set[index][0] for index in range(4)])

# %% [markdown]
# ## One layer, three questions

# %% What did the whole layer see? X' = C^T Y
from lit_deconv import Deconvnet

net = Deconvnet(model, "features.relu2")
whole = net.attribute(images)

# %% What did one feature map see, at all its places?
activations = net.activations(images)
channel = int(activations.amax((0, 2, 3)).argmax())
one_map = net.attribute(images, neuron_selector=channel)

# %% What did its strongest unit see, in each image?
places = activations[:, channel].flatten(1).argmax(1)
width = activations.shape[-1]
units = torch.tensor([[n, channel, p // width, p % width] for n, p in enumerate(places.tolist())])
single = net.reconstruct(images, units)

# %% And a control: units drawn at random. What looks alike in both is the image's, not the unit's.
generator = torch.Generator().manual_seed(0)
drawn = [torch.randint(size, (len(images),), generator=generator) for size in activations.shape[1:]]
control = net.reconstruct(images, torch.stack([torch.arange(len(images)), *drawn], 1))

# %% [markdown]
# ## A figure

# %%
from lit_deconv.render import Heading, Look, Panel, Row, side_by_side, to_pil

look = Look(demo.datamodule.mean, demo.datamodule.std)
rows = [
    Row(
        f"image {n}",
        [
            Panel("input", images[n], is_photograph=True),
            Panel("whole layer", whole[n]),
            Panel(f"feature map {channel}", one_map[n]),
            Panel("strongest unit", single[n]),
            Panel("random unit", control[n]),
        ],
    )
    for n in range(len(images))
]
figure = to_pil(side_by_side(rows, Heading("features.relu2"), look))
figure

# %% [markdown]
# ## Where Captum would go wrong here

# %%
explanation = net.explain(images)
print(explanation)
