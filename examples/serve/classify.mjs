// Classify an image with a folder of `growkit export`, in Node: by onnxruntime-node, or by the browser's WebAssembly.
//
//   npm install onnxruntime-node onnxruntime-web sharp
//   node classify.mjs run/onnx photo.jpg                        # native
//   node classify.mjs run/onnx photo.jpg onnxruntime-web        # what a browser runs
//
// JavaScript cannot read a file's own metadata; export.json beside it says the same.
import { readFile } from "node:fs/promises";
import sharp from "sharp";

const [folder, photo, runtime = "onnxruntime-node"] = process.argv.slice(2);
const ort = await import(runtime);
const { preprocessing, labels } = JSON.parse(await readFile(`${folder}/export.json`, "utf8"));
const [channels, size] = preprocessing.input_size;
if (channels !== 3 || preprocessing.crop_mode !== "center") throw new Error("this example prepares RGB, centre crop");

// Resize so that the shorter side is `edge`, cut the middle out.
const edge = Math.floor(size / preprocessing.crop_pct);
const { width, height } = await sharp(photo).metadata();
const scaled = width <= height ? [edge, Math.trunc((edge * height) / width)] : [Math.trunc((edge * width) / height), edge];
const kernel = { bicubic: "cubic", bilinear: "linear", lanczos: "lanczos3" }[preprocessing.interpolation] ?? "nearest";
const [left, top] = scaled.map((side) => Math.round((side - size) / 2));
const pixels = await sharp(photo, { failOn: "error" })
  .toColourspace("srgb")
  .removeAlpha()
  .resize({ width: scaled[0], height: scaled[1], fit: "fill", kernel, fastShrinkOnLoad: false })
  .extract({ left, top, width: size, height: size })
  .raw()
  .toBuffer();

// Interleaved bytes to planes of normalised floats.
const plane = size * size;
const input = new Float32Array(3 * plane);
for (let i = 0; i < plane; i++)
  for (let c = 0; c < 3; c++)
    input[c * plane + i] = (pixels[3 * i + c] / 255 - preprocessing.mean[c]) / preprocessing.std[c];

const session = await ort.InferenceSession.create(new Uint8Array(await readFile(`${folder}/model.onnx`)));
const feeds = { [session.inputNames[0]]: new ort.Tensor("float32", input, [1, 3, size, size]) };
const logits = (await session.run(feeds)).logits.data;

const largest = logits.reduce((a, b) => Math.max(a, b));
const odds = Array.from(logits, (value) => Math.exp(value - largest));
const total = odds.reduce((a, b) => a + b);
const best = [...odds.keys()]
  .sort((a, b) => odds[b] - odds[a])
  .slice(0, 5)
  .map((index) => ({ class: index, label: labels?.[index] ?? null, probability: odds[index] / total }));
console.log(JSON.stringify(process.env.LOGITS ? { image: photo, best, logits: Array.from(logits) } : { image: photo, best }));
