import pytest

from hga_flax.pretrained.preprocessing import IMAGENET_MEAN, preprocessing_of


@pytest.mark.parametrize(
    ("peer", "path", "size", "short_side", "interpolation", "mean"),
    [
        ("resnet50", "resnet50-0676ba61.pth", 224, 256, "bilinear", 0.485),
        ("resnet50", "/x/resnet50-11ad3fa6.pth", 224, 232, "bilinear", 0.485),
        ("resnext101_64x4d", "resnext101_64x4d-173b62eb.pth", 224, 232, "bilinear", 0.485),
        ("resnet50", "resnet50_a1_0-14fe96d1.pth", 224, 236, "bicubic", 0.485),
        ("resnet50", "resnet50_d-f39db8af.pth", 224, 236, "bicubic", 0.485),
        ("resnet50", "models--timm--resnet50.a1_in1k/snapshots/x/model.safetensors", 224, 236, "bicubic", 0.485),
        ("resnet50", "/data/vol_c-2/resnet50-0676ba61.pth", 224, 256, "bilinear", 0.485),
        ("resnet50", "/data/resnet50.a1_in1k/model.safetensors", 224, 236, "bicubic", 0.485),
        ("resnet50", "resnet50_a1h2_176-001a1197.pth", 224, 224, "bicubic", 0.485),
        ("resnet101", "resnet101_a1h-36d3f2aa.pth", 224, 236, "bicubic", 0.485),
        ("resnest101e", "resnest101-22405ba7.pth", 256, 293, "bilinear", 0.485),
        ("resnest269e", "models--timm--resnest269e.in1k/snapshots/x/model.safetensors", 416, 448, "bicubic", 0.485),
        ("resnet50", "resnet50_ram-a26f946b.pth", 224, 256, "bicubic", 0.485),
        ("resnet101", "gluon_resnet101_v1b-3b017079.pth", 224, 256, "bicubic", 0.485),
        ("resnet34", "resnet34.ra4_e3600_r224_in1k.safetensors", 224, 249, "bicubic", 0.5),
        ("googlenet", "googlenet-1378be20.pth", 224, 256, "bilinear", 0.5),
        ("seresnet50", "my_own.pth", 224, 256, "bilinear", 0.485),
        ("pytorch_resnet_cifar10/resnet20", "resnet20-12fca82f.th", 32, None, "none", 0.485),
    ],
)
def test_what_is_known_by_name(peer, path, size, short_side, interpolation, mean):
    known = preprocessing_of(peer, path)
    assert (known.image_size, known.interpolation, known.mean[0]) == (size, interpolation, mean)
    assert (round(size / known.crop_fraction) if known.crop_fraction else None) == short_side


def test_each_cifar_program_has_its_own_and_another_is_not_guessed():
    known = lambda file: preprocessing_of("pytorch-cifar-models/cifar_resnet20", file)
    assert known("cifar10_resnet20-4118986f.pt").std == (0.2023, 0.1994, 0.2010)
    assert known("x/cifar100_resnet20-23dac2f1.pt").mean == (0.5070, 0.4865, 0.4409)
    assert known("my_own.pt") is None


def test_weights_of_no_known_name_are_prepared_as_torchvision_does():
    assert preprocessing_of("resnet50", "weights.pth").mean == IMAGENET_MEAN
