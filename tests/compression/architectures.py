"""Small nets of every family that fleets hold, written the way their authors write them: those for images."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, everyone's name for it


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A net, its sample input, and how many of its layers structured pruning reaches."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    reached: int


def image(channels: int, size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, channels, size, size, dtype=torch.float64)


def features(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, dtype=torch.float64)


def tokens(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(0, vocabulary, (batch, length))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that hide nothing: no zeros, no ones; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            for name, tensor in [
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ]:
                if tensor.is_floating_point():
                    low = 0.5 if "weight" in name or "var" in name else -0.5
                    tensor.data.uniform_(low, low + 1, generator=generator)
    return model.double().eval()


class ArticleCNN(nn.Module):
    """The convolutional net of the article."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(16 * 4 * 4, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
        x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)
    )


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 8, 16, 16]
        blocks: list[nn.Module] = []
        for i, (wide_in, wide_out) in enumerate(pairwise(widths)):
            blocks += [
                nn.Conv2d(wide_in, wide_out, 3, padding=1),
                nn.BatchNorm2d(wide_out),
                nn.ReLU(inplace=True),
            ]
            blocks += [nn.MaxPool2d(2)] if i % 2 else []
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Linear(16 * 2 * 2, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(-1, 16 * 2 * 2))


class Basic(nn.Module):
    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide_out),
        )
        self.conv2, self.bn2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False), nn.BatchNorm2d(wide_out)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.down = nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return F.relu(y)


class Bottleneck(nn.Module):
    def __init__(self, wide_in: int, middle: int, wide_out: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide_in, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, wide_out, 1, bias=False), nn.BatchNorm2d(wide_out)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or wide_in != wide_out:
            self.down = nn.Sequential(
                nn.Conv2d(wide_in, wide_out, 1, stride, bias=False), nn.BatchNorm2d(wide_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.down(x))


class ResNet(nn.Module):
    def __init__(self, blocks: list[nn.Module], wide: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(wide, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, 2, 1)
        x = F.adaptive_avg_pool2d(self.blocks(x), 1)
        return self.fc(x.view(x.size(0), -1))


class SqueezeExcite(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(wide, 4, 1), nn.Conv2d(4, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Inverted(nn.Module):
    def __init__(self, wide_in: int, wide_out: int, stride: int) -> None:
        super().__init__()
        middle = wide_in * 3
        self.residual = stride == 1 and wide_in == wide_out
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.Hardswish(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle), nn.Hardswish(),
            SqueezeExcite(middle), nn.Conv2d(middle, wide_out, 1, bias=False), nn.BatchNorm2d(wide_out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(),
        Inverted(8, 8, 1), Inverted(8, 12, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 10),
    )  # fmt: skip


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 + 4 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(8 + 4 * i, 4, 3, padding=1, bias=False) for i in range(3)])
        self.last, self.transition, self.fc = nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            found.append(conv(F.relu(norm(torch.cat(found, 1)))))
        x = self.transition(F.relu(self.last(torch.cat(found, 1))))
        return self.fc(F.relu(x).mean([2, 3]))


class ConvNeXtBlock(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(wide, wide, 7, padding=3, groups=wide), nn.LayerNorm(wide)
        self.up, self.down = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)
        self.gamma = nn.Parameter(torch.rand(wide) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), nn.Conv2d(8, 12, 2, 2), ConvNeXtBlock(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 5),
    )  # fmt: skip


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 4 * 4, 6), nn.Linear(6, 12 * 4 * 4), nn.Unflatten(1, (12, 4, 4)),
        nn.ConvTranspose2d(12, 8, 2, 2), nn.BatchNorm2d(8), nn.PReLU(8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8),
        nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Sigmoid(),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.join, self.shuffle, self.last = (
            nn.Conv2d(16, 8, 3, padding=1),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(4, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.norm(self.down2(F.max_pool2d(one, 2))))
        y = F.relu(self.join(torch.cat([one, self.up(two)], dim=1)))
        y = F.pixel_shuffle(self.shuffle(y), 2)
        return self.last(F.interpolate(y, scale_factor=0.5, mode="bilinear", align_corners=False))


class Shuffle(nn.Module):
    """Halves of the channels, grouped convolutions, and the shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        )
        self.grouped, self.fc = nn.Conv2d(16, 12, 1, groups=2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).relu().chunk(2, dim=1)
        y = torch.cat((one, self.branch(two)), 1)
        batch, channels, height, width = y.shape
        y = (
            y.view(batch, 2, channels // 2, height, width)
            .transpose(1, 2)
            .reshape(batch, channels, height, width)
        )
        return self.fc(self.grouped(y).relu().flatten(2).sum(-1))


class Sound(nn.Module):
    """One-dimensional convolutions with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv1d(2, 16, 5, padding=2), nn.BatchNorm1d(16)
        self.conv2, self.skip = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 1)
        self.fc1, self.fc2 = nn.Linear(8 * 5, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.norm(self.conv1(x)), dim=1)
        x = F.adaptive_max_pool1d(F.leaky_relu(self.conv2(x)) + self.skip(x), 5)
        x = x.transpose(1, 2).reshape(-1, 40)
        one, other = torch.split(self.fc1(x), [4, 8], dim=1)
        return self.fc2(torch.cat([torch.sigmoid(one), other], 1))


ARCHITECTURES = {
    "article_cnn": Architecture(build=ArticleCNN, inputs=image(1, 16), reached=3),
    "mlp": Architecture(build=mlp, inputs=features(12), reached=2),
    "vgg": Architecture(build=VGG, inputs=image(3, 8), reached=5),
    "resnet": Architecture(
        build=lambda: ResNet([Basic(8, 8, 1), Basic(8, 16, 2), Basic(16, 16, 1)], 16),
        inputs=image(3, 16),
        reached=8,
    ),
    "resnet_bottleneck": Architecture(
        build=lambda: ResNet([Bottleneck(8, 4, 16, 1), Bottleneck(16, 8, 16, 1)], 16),
        inputs=image(3, 16),
        reached=8,
    ),
    "resnext": Architecture(
        build=lambda: ResNet([Bottleneck(8, 8, 16, 1, 4), Bottleneck(16, 12, 16, 1, 3)], 16),
        inputs=image(3, 16),
        reached=8,
    ),
    "mobilenet": Architecture(build=mobilenet, inputs=image(3, 16), reached=11),
    "densenet": Architecture(build=DenseNet, inputs=image(3, 8), reached=5),
    "convnext": Architecture(build=convnext, inputs=image(3, 16), reached=2),
    "autoencoder": Architecture(build=autoencoder, inputs=image(1, 16), reached=5),
    "unet": Architecture(build=UNet, inputs=image(3, 8), reached=5),
    "shuffle": Architecture(build=Shuffle, inputs=image(3, 8), reached=4),
    "sound": Architecture(build=Sound, inputs=features(2, 20), reached=4),
}
