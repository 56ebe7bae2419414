// Tensors → arguments.h. Every tensor is checked; what a user sees of a mistake is
// said earlier, by the Python wrappers.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "arguments.h"

namespace flowgrove {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Fails with one line unless it is `right`. STD_TORCH_CHECK would begin it with the path of this file where it was
// compiled.
template <typename... Parts>
void check(bool right, const Parts&... message) {
  if (right) return;
  std::ostringstream line;
  (line << ... << message);
  throw std::runtime_error(line.str());
}

inline Kind kind_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "flowgrove_native: pass fp32, bf16 or fp16");
  return type == ScalarType::Float ? Kind::fp32 : type == ScalarType::BFloat16 ? Kind::bf16 : Kind::fp16;
}

inline void check_rows(const Tensor& tensor, int64_t rows, int64_t elements) {
  check(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == elements &&
          (elements <= 1 || tensor.stride(1) == 1),
      "flowgrove_native: pass [", rows, ", ", elements, "] with elements side by side");
}

// A tensor without elements has no memory, yet it is there: nothing is read from or written to this.
inline char nothing = 0;

inline Rows rows_of(const Tensor& tensor, int64_t rows, int64_t elements) {
  check_rows(tensor, rows, elements);
  const void* data = tensor.const_data_ptr();
  return {data == nullptr ? &nothing : data, tensor.stride(0), kind_of(tensor)};
}

inline Rows rows_of(const OptionalTensor& tensor, int64_t rows, int64_t elements) {
  return tensor ? rows_of(*tensor, rows, elements) : Rows{};
}

// A state: fp32.
inline Rows state_rows(const Tensor& tensor, int64_t rows, int64_t elements) {
  const Rows found = rows_of(tensor, rows, elements);
  check(found.kind == Kind::fp32, "flowgrove_native: pass fp32 states");
  return found;
}

inline Rows state_rows(const OptionalTensor& tensor, int64_t rows, int64_t elements) {
  return tensor ? state_rows(*tensor, rows, elements) : Rows{};
}

inline OutputRows output_rows(const Tensor& tensor, int64_t rows, int64_t elements) {
  check_rows(tensor, rows, elements);
  void* data = tensor.mutable_data_ptr();
  return {data == nullptr ? &nothing : data, tensor.stride(0), kind_of(tensor)};
}

inline OutputRows output_rows(const OptionalTensor& tensor, int64_t rows, int64_t elements) {
  return tensor ? output_rows(*tensor, rows, elements) : OutputRows{};
}

inline void check_values(const Tensor& tensor, int64_t count, ScalarType type) {
  check(
      tensor.numel() == count && tensor.is_contiguous() && tensor.scalar_type() == type,
      "flowgrove_native: pass ", count, " contiguous values");
}

// One fp32 value per row or edge.
inline const float* values_of(const Tensor& tensor, int64_t count) {
  check_values(tensor, count, ScalarType::Float);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline const float* values_of(const OptionalTensor& tensor, int64_t count) {
  return tensor ? values_of(*tensor, count) : nullptr;
}

inline float* output_values(const Tensor& tensor, int64_t count) {
  check_values(tensor, count, ScalarType::Float);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline int8_t* output_signs(const Tensor& tensor, int64_t count) {
  check_values(tensor, count, ScalarType::Char);
  return static_cast<int8_t*>(tensor.mutable_data_ptr());
}

inline Children children_of(const OptionalTensor& offsets, int64_t fanout, int64_t rows, int64_t edges) {
  if (!offsets) {
    check(edges == rows * fanout, "flowgrove_native: pass rows·fanout edges");
    return {nullptr, fanout};
  }
  check_values(*offsets, rows + 1, ScalarType::Long);
  return {static_cast<const int64_t*>(offsets->const_data_ptr()), 1};
}

inline Key key_of(const Tensor& key, int64_t edges) {
  check(
      key.dim() == 2 && key.size(0) == KEY_WORDS && key.size(1) == edges && key.scalar_type() == ScalarType::Long,
      "flowgrove_native: pass int64 [6, edges]");
  return {static_cast<const int64_t*>(key.const_data_ptr()), key.stride(0), key.stride(1)};
}

inline Noise noise_of(
    const OptionalTensor& given, const OptionalTensor& key, double correlation, int64_t edges, int64_t elements) {
  return {
      state_rows(given, edges, elements),
      key ? key_of(*key, edges) : Key{},
      static_cast<float>(std::sqrt(correlation)),
      static_cast<float>(std::sqrt(1.0 - correlation))};
}

}  // namespace flowgrove
