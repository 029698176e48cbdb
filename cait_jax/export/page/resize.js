// Pillow's antialiased bicubic resize of 8-bit images (Resample.c), and the crop of evaluation.

const BITS = 22; // of a coefficient behind the point, as in Pillow

/** Keys's cubic with a = -0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/** For each output pixel the first input pixel that it reads, and the coefficients as integers. */
function coefficients(from, to) {
  const scale = from / to, widening = Math.max(scale, 1), support = 2 * widening;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), from);
    const weights = [];
    for (let x = first; x < last; x++) weights.push(cubic((x - centre + 0.5) / widening));
    const sum = weights.reduce((a, b) => a + b, 0);
    const whole = (w) => Math.trunc((w / sum) * 2 ** BITS + (w < 0 ? -0.5 : 0.5));
    return { first, weights: weights.map(whole) };
  });
}

/** Resizes along rows and turns the result: (height, width, channels) to (to, height, channels). */
function resizeTurned(pixels, height, width, channels, to) {
  const out = new Uint8Array(to * height * channels), half = 2 ** (BITS - 1);
  coefficients(width, to).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < channels; c++) {
        let sum = half, at = (y * width + first) * channels + c;
        for (const weight of weights) {
          sum += weight * pixels[at];
          at += channels;
        }
        const value = Math.floor(sum / 2 ** BITS);
        out[(x * height + y) * channels + c] = value < 0 ? 0 : value > 255 ? 255 : value;
      }
    }
  });
  return out;
}

/** Pillow passes over an axis only where its length changes. */
function resize(pixels, height, width, channels, [toHeight, toWidth]) {
  const across = width === toWidth
    ? turned(pixels, height, width, channels)
    : resizeTurned(pixels, height, width, channels, toWidth);
  return height === toHeight
    ? turned(across, toWidth, height, channels)
    : resizeTurned(across, toWidth, height, channels, toHeight);
}

function turned(pixels, height, width, channels) {
  const out = new Uint8Array(pixels.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let c = 0; c < channels; c++) {
        out[(x * height + y) * channels + c] = pixels[(y * width + x) * channels + c];
      }
    }
  }
  return out;
}

/** Python's round: halves to even. */
function rounded(x) {
  const low = Math.floor(x), rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

/** Height and width of an image that just covers the target. */
function coveringSize([height, width], [toHeight, toWidth]) {
  if (toHeight === toWidth) {
    return height <= width
      ? [toHeight, Math.trunc((toHeight * width) / height)]
      : [Math.trunc((toHeight * height) / width), toHeight];
  }
  const factor = Math.min(height / toHeight, width / toWidth);
  return [rounded(height / factor), rounded(width / factor)];
}

/** RGBA pixels without transparency to the crop of evaluation, (height, width, channels) as uint8. */
function centreCrop(rgba, height, width, { image_size: [h, w], crop_pct: part, channels }) {
  const pixels = new Uint8Array(height * width * channels);
  for (let i = 0; i < height * width; i++) {
    const [r, g, b] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    if (channels === 1) pixels[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else pixels.set([r, g, b], 3 * i);
  }
  const target = [Math.floor(h / part), Math.floor(w / part)];
  const size = coveringSize([height, width], target);
  const whole = resize(pixels, height, width, channels, size);
  const top = rounded((size[0] - h) / 2), left = rounded((size[1] - w) / 2);
  const crop = new Uint8Array(h * w * channels);
  for (let y = 0; y < h; y++) {
    const start = ((top + y) * size[1] + left) * channels;
    crop.set(whole.subarray(start, start + w * channels), y * w * channels);
  }
  return crop;
}
