"""Any backbone of timm that gives feature maps, under the top-down path."""

import difflib
import logging
import os
import re

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from gs_d2.modeling.backbone import TopDown
from gs_d2.modeling.bn_folding import Trace, fold
from gs_d2.weights import read_weights

BN_MODES = ("folded", "frozen", "trained")

_SET_HERE = ("checkpoint_path", "features_only", "in_chans", "out_indices", "pretrained", "pretrained_cfg")
_SET_HERE += ("pretrained_cfg_overlay", "cache_dir", "exportable", "scriptable")
_MAX_NAMED = 5  # keys of a list that a message spells out
_NORMS = nn.modules.batchnorm._BatchNorm
_logger = logging.getLogger(__name__)


class TimmBackbone(Backbone):
    """A network of timm up to the coarsest map asked for. timm never fetches weights for it.

    The weights are random or those of `weights`; afterwards a detector's checkpoint holds them as the network has them,
    with `bn` "folded" as convolutions with a bias.
    """

    def __init__(
        self,
        name: str,
        out_features: list[str],
        *,
        in_channels: int = 3,
        options: dict | None = None,
        weights: str = "",
        bn: str = "folded",
        freeze_at: int = 0,
    ):
        """
        Args:
            name: of timm's registry, such as "mobilenetv2_100".
            out_features: maps to return: "stride8" is the network's last one of that stride, in pixels; "index2" is
                timm's third one, its out index 2.
            options: more arguments of timm.create_model.
            weights: a .pth or .safetensors file of this network by timm's names, with or without the layers behind the
                maps (such as the classifier), and with its BatchNorm, or with that folded if `bn` is "folded". All of
                the network's must be there, and nothing that is not timm's. If there is no such file, weights must be
                loaded before the network is trained, see :meth:`forward`. "" is random weights.
            bn: "folded" (BatchNorm of fixed statistics, folded into the convolutions; where that cannot be, "frozen"),
                "frozen" (its statistics and affine parameters stay as they are) or "trained".
            freeze_at: what gives the map of stride 2**freeze_at is not trained and costs no backward pass: 1 is the
                stem of most networks, 2 all up to stride 4, as Detectron2's FREEZE_AT of a ResNet. 0 trains everything.

        Raises:
            ImportError: timm is missing.
            ValueError: a name, map, option or file that timm or the network does not have or cannot take.
        """
        super().__init__()
        if bn not in BN_MODES:
            raise ValueError(f"bn (MODEL.GS.TIMM.BN) must be one of {', '.join(BN_MODES)}, got {bn!r}")
        if not out_features:
            raise ValueError("out_features (MODEL.FPN.IN_FEATURES) must name at least one map")
        create = _creator(name, {"in_chans": in_channels, **(options or {})})
        levels = _levels(create)
        indices = [_index(feature, levels, name) for feature in out_features]
        frozen_index = min(_frozen_index(freeze_at, levels, name), max(indices))  # -1: nothing
        taken = sorted({*indices, frozen_index} - {-1})
        self.net = create(features_only=True, out_indices=tuple(taken))
        self._positions = [taken.index(index) for index in indices]
        self._is_nhwc = str(getattr(self.net, "output_fmt", "")).endswith("NHWC")
        self._out_features = list(out_features)
        self._out_feature_strides = {f: levels[i]["reduction"] for f, i in zip(out_features, indices, strict=True)}
        self._out_feature_channels = {f: levels[i]["num_chs"] for f, i in zip(out_features, indices, strict=True)}

        trace = self._trace(name, in_channels, max(level["reduction"] for level in levels))
        needed = trace.parameters_of(trace.outputs[position] for position in self._positions)
        frozen = trace.parameters_of([trace.outputs[taken.index(frozen_index)]] if frozen_index >= 0 else [])
        trained = needed - frozen
        pairs = [pair for pair in trace.convs_before_norms() if _is_foldable(*pair)] if bn == "folded" else []
        _cut_off(self.net, needed)
        trained_names = {name for name, parameter in self.net.named_parameters() if parameter in trained}
        trained_convs = [conv for conv, _ in pairs if conv.weight in trained]
        self._absent_weights = ""
        self._load_and_fold(weights, pairs, create)
        _fix_padding(self.net)
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad = name in trained_names
        for conv in trained_convs:
            conv.requires_grad_(True)  # its bias is new
        self._fixed_norms = [x for x in self.net.modules() if isinstance(x, _NORMS) and (bn != "trained" or _rests(x))]
        for norm in self._fixed_norms:
            for parameter in norm.parameters(recurse=False):
                parameter.requires_grad = False
        self.train(self.training)

    def _load_and_fold(self, path, pairs, create):
        if not path or not os.path.isfile(path):
            if path:
                self._absent_weights = path
                _logger.warning(f"{path} (MODEL.GS.TIMM.WEIGHTS) is not there: weights must come from a checkpoint")
            fold(self.net, pairs)
            return
        state = read_weights(path)["model"]
        to_fold = {norm for _, norm in pairs}
        statistics = {f"{name}.running_var" for name, module in self.net.named_modules() if module in to_fold}
        is_folded = bool(pairs) and statistics.isdisjoint(_by_own_names(self.net, state))
        if not is_folded:
            _load(self.net, state, path, create)
        fold(self.net, pairs)
        if is_folded:
            _load(self.net, state, path, create, is_folded=True)

    def _trace(self, name, in_channels, coarsest) -> Trace:
        """Runs the network on the smallest suitable image, which also finds what sizes it divides."""
        strides = [self._out_feature_strides[feature] for feature in self._out_features]
        divisor = max(strides)
        while True:
            side = 3 * divisor  # odd, in case the network halves more often than the maps tell
            try:
                trace = Trace(self.net, torch.zeros(1, in_channels, side, side))
                found = [tuple(x.shape) for x in self._select(trace.outputs).values()]
                channels = self._out_feature_channels.values()
                wanted = [(1, c, side // s, side // s) for c, s in zip(channels, strides, strict=True)]
                if found != wanted:
                    raise ValueError(f"maps of shapes {found} instead of {wanted}")
                self._size_divisibility = divisor
                return trace
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                if divisor >= coarsest:
                    raise ValueError(
                        f"timm's {name} cannot be a backbone, it fails on images of {side} x {side}: {error}"
                    ) from error
            divisor *= 2

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def train(self, mode: bool = True):
        """As every module's, but that BatchNorm of fixed statistics stays in eval mode."""
        super().train(mode)
        for norm in self._fixed_norms:
            norm.eval()
        return self

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image [N, 3, H, W], H and W multiples of `size_divisibility` -> {name: [N, C, H / stride, W / stride], ...}.

        Raises:
            FileNotFoundError: in training, if the file of weights was missing and none have been loaded since.
        """
        if self.training and self._absent_weights:
            raise FileNotFoundError(
                f"no such weights: {self._absent_weights} (MODEL.GS.TIMM.WEIGHTS), and training would begin from "
                'random ones; set it "" if that is meant'
            )
        return self._select(self.net(image))

    def _select(self, maps):
        maps = [maps[position] for position in self._positions]
        if self._is_nhwc:
            maps = [x.permute(0, 3, 1, 2).contiguous() for x in maps]
        return dict(zip(self._out_features, maps, strict=True))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if any(key.startswith(prefix) for key in state_dict):
            self._absent_weights = ""
        super()._load_from_state_dict(state_dict, prefix, *args)


class SamePaddedConv2d(nn.Conv2d):
    """timm's Conv2dSame for images whose sides its stride divides.

    As in TensorFlow the result has side / stride pixels, and of an odd padding the larger part comes last. For such
    sides the padding is a constant. timm's is arithmetic on the size, which makes an export for any size take minutes.
    """

    def __init__(self, conv: nn.Conv2d):
        """Takes weight and bias of `conv`, the same tensors."""
        super().__init__(1, 1, conv.kernel_size, stride=conv.stride, dilation=conv.dilation, device="meta")
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.weight, self.bias = conv.weight, conv.bias
        self.pads = []  # left, right, top, bottom
        for size, stride, dilation in list(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True))[::-1]:
            total = max(dilation * (size - 1) + 1 - stride, 0)
            self.pads += [total // 2, total - total // 2]

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, dilation=self.dilation, groups=self.groups)


def _fix_padding(net):
    from timm.layers import Conv2dSame

    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if type(child) is Conv2dSame:
                setattr(parent, name, SamePaddedConv2d(child))


def _creator(name, options):
    """timm.create_model for this network, which then fetches nothing."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"a backbone of timm needs that package ({error}): pip install timm") from error
    arch = name.split(".")[0]  # a tag behind the dot names a set of weights
    if not timm.is_model(arch):  # nor are "hf-hub:..." and other addresses
        close = difflib.get_close_matches(arch, timm.list_models(), n=_MAX_NAMED)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r} (MODEL.GS.TIMM.NAME){hint}")
    if reserved := [key for key in options if key in _SET_HERE and key != "in_chans"]:
        raise ValueError(f"options (MODEL.GS.TIMM.OPTIONS) must not set {', '.join(reserved)}")

    def create(**more):
        try:
            return timm.create_model(arch, pretrained=False, **options, **more)
        except Exception as error:  # an option may break anything
            raise ValueError(f"timm cannot create {name} with {options | more}: {error!r}") from error

    return create


def _levels(create) -> list[dict]:
    """Stride ("reduction") and channels ("num_chs") of each map that the network can return."""
    info = create(features_only=True).feature_info
    return [info[index] for index in range(len(info.info))]


def _index(feature, levels, name) -> int:
    match = re.fullmatch(r"(stride|index)(\d+)", feature)
    by_name = {f"index{i}": i for i in range(len(levels))}
    by_name |= {f"stride{level['reduction']}": i for i, level in enumerate(levels)}
    if not match or feature not in by_name:
        raise ValueError(f"timm's {name} has no map {feature!r} (MODEL.FPN.IN_FEATURES); it has {', '.join(by_name)}")
    return by_name[feature]


def _frozen_index(freeze_at, levels, name) -> int:
    """Index of the last map of stride 2**freeze_at; -1 if nothing is to be frozen."""
    if freeze_at == 0:
        return -1
    by_stride = {level["reduction"]: index for index, level in enumerate(levels)}
    if 2**freeze_at not in by_stride:
        allowed = [str(stride.bit_length() - 1) for stride in by_stride if stride > 1]
        raise ValueError(
            f"timm's {name} has no map of stride 2**{freeze_at} to freeze it up to: freeze_at "
            f"(MODEL.BACKBONE.FREEZE_AT) must be one of 0, {', '.join(allowed)}"
        )
    return by_stride[2**freeze_at]


def _is_foldable(conv, norm) -> bool:
    """Whether both are exactly what folding assumes: other classes may scale the weights or what they normalise."""
    from timm.layers import BatchNormAct2d, Conv2dSame

    plain = type(conv) in (nn.Conv2d, Conv2dSame) and type(norm) in (nn.BatchNorm2d, BatchNormAct2d)
    return plain and norm.track_running_stats


def _cut_off(net, needed):
    """Cuts off stages behind the last map needed: some of timm's networks run to their end."""
    for module in net.children():
        while isinstance(module, nn.Sequential) and len(module):
            own = list(module[-1].parameters())
            if not own or any(parameter in needed for parameter in own):
                break
            del module[-1]


def _rests(norm) -> bool:
    """Whether this BatchNorm has parameters and none of them is trained."""
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(parameter.requires_grad for parameter in own)


def _by_own_names(net, state) -> dict:
    """Own name -> name in the file, for what the network has of it."""
    own, names = net.state_dict(), {}
    for key in state:
        # timm's networks that give maps have "stages_0.x" for "stages.0.x" of the whole one, or "model.x" for "x".
        names |= {name: key for name in (key, key.replace(".", "_", 1), f"model.{key}") if name in own}
    return names


def _load(net, state, path, create, is_folded=False):
    """Loads a file's weights, all that the network has; what the file has more must be of timm's whole network."""
    own, names = net.state_dict(), _by_own_names(net, state)
    found = {name: torch.as_tensor(state[key]) for name, key in names.items()}
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    others = state.keys() - names.values()
    if others:
        whole = set(create().state_dict())
        if is_folded:
            whole |= {f"{key.removesuffix('.weight')}.bias" for key in whole}
        others = [key for key in state if key in others - whole]
    shapes = [
        f"{key} {tuple(value.shape)} (the network's is {tuple(own[key].shape)})"
        for key, value in found.items()
        if value.shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:_MAX_NAMED])}{', ...' if len(keys) > _MAX_NAMED else ''}"
        for what, keys in (("missing", missing), ("unexpected", others), ("of another shape", shapes))
        if keys
    ]
    if problems:
        lost = any(key.endswith("running_var") for key in missing)
        hint = ". If the file's BatchNorm is folded, set MODEL.GS.TIMM.BN folded" if lost else ""
        raise ValueError(f"{path} (MODEL.GS.TIMM.WEIGHTS) does not fit the network. Keys {'; '.join(problems)}{hint}")
    net.load_state_dict(found, strict=False)


@BACKBONE_REGISTRY.register()
def build_timm_topdown_backbone(cfg, input_shape: ShapeSpec):
    """MODEL.GS.TIMM.* and MODEL.BACKBONE.FREEZE_AT with MODEL.FPN.{IN_FEATURES, OUT_CHANNELS, NORM}; IN_FEATURES are
    names of :class:`TimmBackbone`, such as "stride8"."""
    keys = cfg.MODEL.GS.TIMM
    if len(keys.OPTIONS) % 2:
        raise ValueError(f"MODEL.GS.TIMM.OPTIONS must be names and values in turn, got {list(keys.OPTIONS)}")
    bottom_up = TimmBackbone(
        keys.NAME,
        cfg.MODEL.FPN.IN_FEATURES,
        in_channels=input_shape.channels,
        options=dict(zip(keys.OPTIONS[::2], keys.OPTIONS[1::2], strict=True)),
        weights=keys.WEIGHTS,
        bn=keys.BN,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return TopDown(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        context_levels=cfg.MODEL.GS.CONTEXT_LEVELS,
    )
