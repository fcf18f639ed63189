"""python score.py model.onnx a.jpg b.png > scores.csv: scores as `train.py predict` gives, with only these packages."""

import io
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(data, size, square, encoding, quality, bits, max_pixels):  # as the images that the network learned from
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    kind, turn = data[24:26] if image.format == "PNG" else image.format, image.getexif().get(274, 1)
    assert kind in ("JPEG", b"\x10\0") or kind[0] in (1, 2, 4, 8), f"neither JPEG nor PNG of 8 bits or 16 gray: {kind}"
    is_kept = kind == "JPEG" and image.mode == "L" and turn == 1 and not (size and "progressive" in image.info)
    shape = image.size if turn in (5, 6, 7, 8) else image.size[::-1]
    ratio = 1 if not size else size / max(shape) if square == "pad" else min(1, size / min(shape))
    inner = [size if square in ("crop", "stretch") else max(1, round(side * ratio)) for side in shape]
    drafted = image.draft("L", (inner[1] * 3 // 2, inner[0] * 3 // 2) if turn == 1 else None)  # to 1/2, 1/4 or 1/8
    if kind == b"\x10\0":  # white is the highest level of the bits used
        levels = np.array(image, int) * (np.array(image) != image.info.get("transparency"))
        stated = data[data.find(b"sBIT") + 4] if b"sBIT" in data[: data.find(b"IDAT")] else 0
        depths = [bits] if bits else [stated, 16] if stated else [8, 10, 12, 14, 16]
        full = 2 ** next(depth for depth in depths if not levels.max() >> depth) - 1
        image = Image.fromarray(((levels * 255 + full // 2) // full).astype(np.uint8))
    image = ImageOps.exif_transpose(image.crop(drafted[1]) if drafted else image)  # to the nearest pixel
    alpha = np.asarray(image.convert("RGBA").getchannel("A"), int)
    pixels = ((np.asarray(image.convert("L")) * (alpha if alpha.any() else alpha + 255) + 127) // 255).astype(np.uint8)
    if square == "crop":
        pixels = pixels[tuple(slice((n - min(pixels.shape)) // 2, (n + min(pixels.shape)) // 2) for n in pixels.shape)]
    bars = [size - side if square == "pad" else 0 for side in inner]
    pixels = np.pad(resize(pixels, *inner), [(bar // 2, (bar + 1) // 2) for bar in bars])
    if encoding != "jpeg" or (is_kept and pixels.shape == shape):
        return pixels
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resize(pixels, height, width):  # OpenCV's INTER_LINEAR_EXACT; to less than half a side, Pillow's HAMMING
    if pixels.shape[0] > 2 * height or pixels.shape[1] > 2 * width:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.HAMMING))
    for side, old in ((width, pixels.shape[1]), (height, pixels.shape[0])):
        left, share = np.divmod(np.rint(((np.arange(side) + 0.5) * (old / side) - 0.5) * 256).astype(int), 256)
        near, far = (pixels.take(left + step, axis=1, mode="clip") for step in (0, 1))
        pixels = (near * (256 - share) + far * share).T
    return ((pixels + 2**15) >> 16).astype(np.uint8)


session = onnxruntime.InferenceSession(sys.argv[1])
facts = session.get_modelmeta().custom_metadata_map
labels, shape, options, cuts = (json.loads(facts[name]) for name in ("labels", "image_size", "images", "thresholds"))
cuts = cuts.get(facts["threshold_rule"].split(">")[0], {})
print(facts["use"], file=sys.stderr)
print("file", *labels, *(f"{label} positive" for label in cuts), sep=",")
for file in sys.argv[2:]:
    pixels = resize(prepare(np.fromfile(file, np.uint8).tobytes(), **options), *shape)
    scores, *calls = (values[0] for values in session.run(None, {"images": pixels[None, None]}))
    print(f'"{file}"', *scores, *("" if cut is None else int(on) for cut, on in zip(cuts.values(), *calls)), sep=",")
