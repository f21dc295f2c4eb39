"""The demo's nets, small enough to train in seconds and different enough to show what can be deleted."""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def mlp() -> nn.Module:
    """Perceptron of two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, CLASSES)
    )


class BatchNormCnn(nn.Module):
    """Three convolutions with batch normalization, dropout, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(64)
        self.dropout = nn.Dropout(0.2)
        self.fc1 = nn.Linear(64 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, 10] of images [N, 1, 8, 8]."""
        x = torch.relu(self.norm1(self.conv1(images)))
        x = functional.max_pool2d(torch.relu(self.norm2(self.conv2(x))), 2)
        x = functional.max_pool2d(torch.relu(self.norm3(self.conv3(x))), 2)
        x = torch.relu(self.fc1(self.dropout(x.flatten(1))))
        scores: Tensor = self.fc2(x)
        return scores


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, stride: int, before: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = (
            nn.Conv2d(before, channels, 1, stride) if (stride, before) != (1, channels) else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same layout in and out: [N, channels, height, width]."""
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class ResidualNet(nn.Module):
    """A stem, three residual blocks, global pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1)
        self.block1 = Block(24, 1, 24)
        self.block2 = Block(48, 2, 24)
        self.block3 = Block(48, 1, 48)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, 10] of images [N, 1, 8, 8]."""
        x = self.block3(self.block2(self.block1(torch.relu(self.stem(images)))))
        scores: Tensor = self.head(x.mean(dim=(2, 3)))
        return scores


NETS = {"mlp": mlp, "cnn": BatchNormCnn, "resnet": ResidualNet}
EPOCHS = {"mlp": 15, "cnn": 6, "resnet": 6}
