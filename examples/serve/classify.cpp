// Classify an image with a file of `growkit export`, by ONNX Runtime's C++ API.
//
//   g++ -std=c++17 -O2 classify.cpp -I ORT/include -L ORT/lib -lonnxruntime -Wl,-rpath,ORT/lib -o classify
//   ./classify run/onnx/model.onnx photo.jpg
//
// ORT is an unpacked release of ONNX Runtime; Debian has the rest as nlohmann-json3-dev and libstb-dev.
#include <onnxruntime_cxx_api.h>

#define STB_IMAGE_IMPLEMENTATION
#include <stb/stb_image.h>
#define STB_IMAGE_RESIZE_IMPLEMENTATION
#include <stb/stb_image_resize.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <vector>

using nlohmann::json;

// The image as planes of normalised floats (3, size, size): shorter side to `edge`, middle cut out.
std::vector<float> prepare(const char* photo, const json& wanted) {
  const int size = wanted["input_size"][1];
  if (wanted["input_size"][0] != 3 || wanted["crop_mode"] != "center" || wanted["interpolation"] != "bicubic")
    throw std::runtime_error("this example prepares RGB, bicubic, centre crop");
  int width, height, stored;
  unsigned char* image = stbi_load(photo, &width, &height, &stored, 3);
  if (!image) throw std::runtime_error(std::string(photo) + ": " + stbi_failure_reason());
  const int edge = static_cast<int>(std::floor(size / wanted["crop_pct"].get<double>()));
  const int w = width <= height ? edge : static_cast<int>(static_cast<double>(edge) * width / height);
  const int h = width <= height ? static_cast<int>(static_cast<double>(edge) * height / width) : edge;
  std::vector<unsigned char> scaled(3 * w * h);
  // Catmull-Rom is the bicubic of Pillow and of timm
  stbir_resize_uint8_generic(image, width, height, 0, scaled.data(), w, h, 0, 3, STBIR_ALPHA_CHANNEL_NONE, 0,
                             STBIR_EDGE_CLAMP, STBIR_FILTER_CATMULLROM, STBIR_COLORSPACE_LINEAR, nullptr);
  stbi_image_free(image);
  const int left = static_cast<int>(std::nearbyint((w - size) / 2.0));
  const int top = static_cast<int>(std::nearbyint((h - size) / 2.0));
  std::vector<float> input(3 * size * size);
  for (int c = 0; c < 3; ++c) {
    const float mean = wanted["mean"][c], std = wanted["std"][c];
    for (int y = 0; y < size; ++y)
      for (int x = 0; x < size; ++x)
        input[(c * size + y) * size + x] = (scaled[3 * ((y + top) * w + x + left) + c] / 255.0f - mean) / std;
  }
  return input;
}

int main(int count, char** words) try {
  if (count != 3) throw std::runtime_error("usage: classify model.onnx photo");
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::SessionOptions options;
  options.AddConfigEntry("session.intra_op.allow_spinning", "0");  // idle threads leave the cores to others
  Ort::Session session(env, words[1], options);

  Ort::AllocatorWithDefaultOptions allocator;
  auto metadata = session.GetModelMetadata();
  const json wanted = json::parse(metadata.LookupCustomMetadataMapAllocated("preprocessing", allocator).get());
  auto stored = metadata.LookupCustomMetadataMapAllocated("labels", allocator);
  const json labels = stored ? json::parse(stored.get()) : json();

  std::vector<float> input = prepare(words[2], wanted);
  const int64_t size = wanted["input_size"][1], shape[] = {1, 3, size, size};
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  auto tensor = Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape, 4);
  auto name = session.GetInputNameAllocated(0, allocator);
  const char *inputs[] = {name.get()}, *outputs[] = {"logits"};
  auto answers = session.Run(Ort::RunOptions(), inputs, &tensor, 1, outputs, 1);
  const float* logits = answers[0].GetTensorData<float>();
  const size_t classes = answers[0].GetTensorTypeAndShapeInfo().GetElementCount();

  std::vector<size_t> order(classes);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double total = 0;
  for (size_t i = 0; i < classes; ++i) total += std::exp(logits[i] - logits[order[0]]);
  json best = json::array();
  for (size_t i = 0; i < std::min<size_t>(5, classes); ++i)
    best.push_back({{"class", order[i]},
                    {"label", labels.is_null() ? json() : labels[order[i]]},
                    {"probability", std::exp(logits[order[i]] - logits[order[0]]) / total}});
  json line = {{"image", words[2]}, {"best", best}};
  if (std::getenv("LOGITS")) line["logits"] = std::vector<float>(logits, logits + classes);
  std::cout << line << "\n";
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 2;
}
