// Products of a matrix with few vectors, and what stands between them in a decoder layer, on the CPU.
//
// A step of one token reads every weight once and computes little with it: what counts is that memory is read in order,
// by all threads, at its own pace. Matrices are (rows, columns) = (outputs, inputs), row by row as a checkpoint holds
// them, in float32, bfloat16 or float16; or packed to 8 or 4 bits in tiles of 16 rows (see `Packed` below).
//
// Plain C interface, called through ctypes: no header of Python or torch is needed, and the interpreter's lock is free
// meanwhile. Threads are OpenMP's, which in a process with torch are torch's own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define LYRA_AVX512 1
#endif
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LYRA_AVX2 1
#endif

namespace {

// Calls `body` with (number, of) in as many threads at once. One thread goes without OpenMP, which asks for memory for
// every team of one, and ends the process where that is refused.
template <typename Body>
void in_threads(int threads, const Body& body) {
  if (threads == 1) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    int number = 0, of = 1;
#ifdef _OPENMP
    number = omp_get_thread_num();
    of = omp_get_num_threads();
#endif
    body(number, of);
  }
}

enum Kind : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kPacked8 = 3, kPacked4 = 4 };

constexpr int64_t kTile = 16;   // rows of a tile: the 32-bit lanes of a 512-bit register
constexpr int64_t kGroup = 32;  // inputs that share a scale
constexpr int64_t kQuad = 4;    // inputs that one lane multiplies at once
constexpr int64_t kMostTokens = 8;
constexpr int kInterface = 1;
constexpr int kNoMemory = 3;  // what a function returns where memory is refused; others than 0 are misuse

// Values that 4 bits stand for, times 127: the quantiles of a normal distribution that NF4 uses (arXiv 2305.14314,
// appendix E), rounded to 8 bits so that a shuffle looks them up and integers multiply them.
constexpr int8_t kLevels[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

inline float from_bf16(uint16_t value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}

inline float from_half(uint16_t value) {
#if defined(__F16C__)
  return _cvtsh_ss(value);
#elif defined(__FLT16_MAX__)
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return static_cast<float>(half);
#else
  uint32_t sign = (value & 0x8000u) << 16, exponent = (value >> 10) & 31u, fraction = value & 0x3ffu;
  float result;
  if (exponent == 0) {
    result = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -result : result;
  }
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}

inline uint16_t to_half(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, 0));
#elif defined(__FLT16_MAX__)
  _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    float scaled = std::fabs(value) * 16777216.0f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled)));
  }
  uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

inline float load(const void* from, int kind, int64_t at) {
  if (kind == kFloat32) return static_cast<const float*>(from)[at];
  uint16_t value = static_cast<const uint16_t*>(from)[at];
  return kind == kBFloat16 ? from_bf16(value) : from_half(value);
}

inline void store(void* to, int kind, int64_t at, float value) {
  if (kind == kFloat32) static_cast<float*>(to)[at] = value;
  else static_cast<uint16_t*>(to)[at] = kind == kBFloat16 ? to_bf16(value) : to_half(value);
}

// ---------------------------------------------------------------------------------------------------------------------
// Inputs: as 32-bit floats, and as 8-bit integers with a scale per group.

struct Inputs {
  int64_t tokens = 0, columns = 0;
  std::vector<float> values;      // (tokens, columns)
  std::vector<uint16_t> bf16;     // (tokens, columns), for kernels that multiply bfloat16
  std::vector<int8_t> integers;   // (tokens, columns)
  std::vector<float> scales;      // (tokens, groups)
  std::vector<int32_t> offsets;   // (tokens, groups): -128 times the group's sum, as weights are stored plus 128
};

void take(Inputs& inputs, const void* x, int kind, int64_t tokens, int64_t columns) {
  inputs.tokens = tokens;
  inputs.columns = columns;
  inputs.values.resize(tokens * columns);
  for (int64_t at = 0; at < tokens * columns; ++at) inputs.values[at] = load(x, kind, at);
}

[[maybe_unused]] void round_inputs(Inputs& inputs) {
  inputs.bf16.resize(inputs.values.size());
  for (size_t at = 0; at < inputs.values.size(); ++at) inputs.bf16[at] = to_bf16(inputs.values[at]);
}

void quantize_inputs(Inputs& inputs) {
  const int64_t groups = inputs.columns / kGroup;
  inputs.integers.resize(inputs.values.size());
  inputs.scales.resize(inputs.tokens * groups);
  inputs.offsets.resize(inputs.tokens * groups);
  for (int64_t group = 0; group < inputs.tokens * groups; ++group) {
    const float* from = inputs.values.data() + group * kGroup;
    int8_t* to = inputs.integers.data() + group * kGroup;
    float most = 0;
    for (int64_t i = 0; i < kGroup; ++i) most = std::max(most, std::fabs(from[i]));
    const float inverse = most > 0 ? 127.0f / most : 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < kGroup; ++i) {
      to[i] = static_cast<int8_t>(std::nearbyint(from[i] * inverse));
      sum += to[i];
    }
    inputs.scales[group] = most / 127.0f;
    inputs.offsets[group] = -128 * sum;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows as the checkpoint holds them.

#if LYRA_AVX512
inline __m512 widen(const uint16_t* from, int kind) {
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if (kind == kFloat16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
#endif

// sums[token] of one row with every token.
template <int kind, int tokens>
void dot_rows(const void* weights, int64_t row, const Inputs& inputs, int64_t first, float* sums) {
  const int64_t columns = inputs.columns;
  const float* x = inputs.values.data() + first * columns;
  int64_t at = 0;
#if LYRA_AVX512
  __m512 total[tokens];
  for (int token = 0; token < tokens; ++token) total[token] = _mm512_setzero_ps();
#if defined(__AVX512BF16__)
  if constexpr (kind == kBFloat16) {
    const uint16_t* w = static_cast<const uint16_t*>(weights) + row * columns;
    const uint16_t* short_x = inputs.bf16.data() + first * columns;
    __m512 other[tokens];
    for (int token = 0; token < tokens; ++token) other[token] = _mm512_setzero_ps();
    for (; at + 64 <= columns; at += 64) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(w + at), high = (__m512bh)_mm512_loadu_si512(w + at + 32);
      _mm_prefetch(reinterpret_cast<const char*>(w + at + 1024), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(w + at + 1056), _MM_HINT_T0);
      for (int token = 0; token < tokens; ++token) {
        const uint16_t* own = short_x + token * columns + at;
        total[token] = _mm512_dpbf16_ps(total[token], low, (__m512bh)_mm512_loadu_si512(own));
        other[token] = _mm512_dpbf16_ps(other[token], high, (__m512bh)_mm512_loadu_si512(own + 32));
      }
    }
    for (int token = 0; token < tokens; ++token) total[token] = _mm512_add_ps(total[token], other[token]);
  }
#endif
  for (; at + 16 <= columns; at += 16) {
    __m512 w;
    if constexpr (kind == kFloat32) w = _mm512_loadu_ps(static_cast<const float*>(weights) + row * columns + at);
    else w = widen(static_cast<const uint16_t*>(weights) + row * columns + at, kind);
    for (int token = 0; token < tokens; ++token)
      total[token] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + token * columns + at), total[token]);
  }
  for (int token = 0; token < tokens; ++token) sums[token] = _mm512_reduce_add_ps(total[token]);
#elif LYRA_AVX2
  // Several sums at once: one would wait for the one before.
  constexpr int kSums = tokens == 1 ? 4 : 2;
  __m256 total[tokens][kSums];
  for (int token = 0; token < tokens; ++token)
    for (int sum = 0; sum < kSums; ++sum) total[token][sum] = _mm256_setzero_ps();
  for (; at + 8 * kSums <= columns; at += 8 * kSums) {
    for (int sum = 0; sum < kSums; ++sum) {
      const int64_t here = row * columns + at + 8 * sum;
      __m256 w;
      if constexpr (kind == kFloat32) {
        w = _mm256_loadu_ps(static_cast<const float*>(weights) + here);
      } else {
        const __m128i raw =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(weights) + here));
        w = kind == kFloat16 ? _mm256_cvtph_ps(raw)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
      }
      for (int token = 0; token < tokens; ++token)
        total[token][sum] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + token * columns + at + 8 * sum), total[token][sum]);
    }
  }
  for (int token = 0; token < tokens; ++token) {
    for (int sum = 1; sum < kSums; ++sum) total[token][0] = _mm256_add_ps(total[token][0], total[token][sum]);
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(total[token][0]), _mm256_extractf128_ps(total[token][0], 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    sums[token] = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
#else
  for (int token = 0; token < tokens; ++token) sums[token] = 0;
#endif
  for (; at < columns; ++at) {
    const float w = load(weights, kind, row * columns + at);
    for (int token = 0; token < tokens; ++token) sums[token] += w * x[token * columns + at];
  }
}

// sums[0..kStreams) of neighbouring rows with one token. The processor fetches ahead in each of several rows at once, and
// memory is read 15% to 20% faster than row by row.
#if LYRA_AVX512
constexpr int64_t kStreams = 8;
constexpr int64_t kAhead = 1024;  // bytes

template <int kind>
void dot_streams(const void* weights, int64_t row, const Inputs& inputs, float* sums) {
  constexpr int64_t size = kind == kFloat32 ? 4 : 2;
  const int64_t columns = inputs.columns;
  const char* first = static_cast<const char*>(weights) + row * columns * size;
  __m512 total[kStreams];
  for (int stream = 0; stream < kStreams; ++stream) total[stream] = _mm512_setzero_ps();
  int64_t at = 0;
#if defined(__AVX512BF16__)
  if constexpr (kind == kBFloat16) {
    for (; at + 32 <= columns; at += 32) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(inputs.bf16.data() + at);
      for (int stream = 0; stream < kStreams; ++stream) {
        const char* w = first + (stream * columns + at) * size;
        _mm_prefetch(w + kAhead, _MM_HINT_T0);
        total[stream] = _mm512_dpbf16_ps(total[stream], (__m512bh)_mm512_loadu_si512(w), x);
      }
    }
  }
#endif
  for (; at + 16 <= columns; at += 16) {
    const __m512 x = _mm512_loadu_ps(inputs.values.data() + at);
    for (int stream = 0; stream < kStreams; ++stream) {
      const char* w = first + (stream * columns + at) * size;
      _mm_prefetch(w + kAhead, _MM_HINT_T0);
      __m512 values;
      if constexpr (kind == kFloat32) values = _mm512_loadu_ps(w);
      else values = widen(reinterpret_cast<const uint16_t*>(w), kind);
      total[stream] = _mm512_fmadd_ps(values, x, total[stream]);
    }
  }
  for (int stream = 0; stream < kStreams; ++stream) {
    sums[stream] = _mm512_reduce_add_ps(total[stream]);
    for (int64_t rest = at; rest < columns; ++rest)
      sums[stream] += load(weights, kind, (row + stream) * columns + rest) * inputs.values[rest];
  }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Packed matrices: tiles of 16 rows; in a tile one group of 32 inputs after the other; in a group 8 quads of 4 inputs,
// each the 4 weights of row 0, of row 1, ... So one register holds a quad of all 16 rows, a product with 4 inputs adds
// to 16 sums, and memory is read from front to back.
//
// 8 bits: the weight plus 128. 4 bits: two quads share their bytes, the even one in the low halves.
// Scales: of 4 bits float16, (tiles, groups, 16 rows); of 8 bits float32, one for each row: a byte has levels enough.

struct Packed {
  const uint8_t* codes;
  const void* scales;
  int64_t rows, columns;
};

template <int kind>
constexpr int64_t group_bytes() {
  return kTile * kGroup / (kind == kPacked4 ? 2 : 1);
}

template <int kind, int tokens>
void dot_tile(const Packed& packed, int64_t tile, const Inputs& inputs, int64_t first, float (*sums)[kTile]) {
  const int64_t groups = packed.columns / kGroup;
  const uint8_t* codes = packed.codes + tile * groups * group_bytes<kind>();
  const uint16_t* scales = static_cast<const uint16_t*>(packed.scales) + tile * groups * kTile;
  const float* row_scales = static_cast<const float*>(packed.scales) + tile * kTile;
#if LYRA_AVX512 && defined(__AVX512VNNI__)
  __m512 total[tokens];
  for (int token = 0; token < tokens; ++token) total[token] = _mm512_setzero_ps();
  const __m512i low_half = _mm512_set1_epi8(15);
  alignas(64) uint8_t levels[16];
  for (int i = 0; i < 16; ++i) levels[i] = static_cast<uint8_t>(kLevels[i] + 128);
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(levels)));
  for (int64_t group = 0; group < groups; ++group, codes += group_bytes<kind>(), scales += kTile) {
    __m512 scale;
    if constexpr (kind == kPacked4) scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    __m512i sum[tokens];
    for (int token = 0; token < tokens; ++token)
      sum[token] = _mm512_set1_epi32(inputs.offsets[(first + token) * groups + group]);
    for (int pair = 0; pair < 4; ++pair) {
      __m512i even, odd;
      if constexpr (kind == kPacked4) {
        const __m512i both = _mm512_loadu_si512(codes + pair * 64);
        even = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low_half));
        odd = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half));
      } else {
        even = _mm512_loadu_si512(codes + pair * 128);
        odd = _mm512_loadu_si512(codes + pair * 128 + 64);
      }
      for (int token = 0; token < tokens; ++token) {
        const int8_t* x = inputs.integers.data() + (first + token) * packed.columns + group * kGroup + pair * 8;
        int32_t four[2];
        std::memcpy(four, x, 8);
        sum[token] = _mm512_dpbusd_epi32(sum[token], even, _mm512_set1_epi32(four[0]));
        sum[token] = _mm512_dpbusd_epi32(sum[token], odd, _mm512_set1_epi32(four[1]));
      }
    }
    _mm_prefetch(reinterpret_cast<const char*>(codes + 4 * group_bytes<kind>()), _MM_HINT_T0);
    for (int token = 0; token < tokens; ++token) {
      __m512 both = _mm512_set1_ps(inputs.scales[(first + token) * groups + group]);
      if constexpr (kind == kPacked4) both = _mm512_mul_ps(scale, both);
      total[token] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[token]), both, total[token]);
    }
  }
  for (int token = 0; token < tokens; ++token) {
    if constexpr (kind == kPacked8) total[token] = _mm512_mul_ps(total[token], _mm512_loadu_ps(row_scales));
    _mm512_storeu_ps(sums[token], total[token]);
  }
#elif LYRA_AVX2
  // 8 bits without sign times 8 bits with one add up in 16: the weight's sign goes to the input, so that none overflows.
  __m256 total[tokens][2];
  for (int token = 0; token < tokens; ++token) total[token][0] = total[token][1] = _mm256_setzero_ps();
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(-128);
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels)));
  for (int64_t group = 0; group < groups; ++group, codes += group_bytes<kind>(), scales += kTile) {
    __m256i sum[tokens][2];
    for (int token = 0; token < tokens; ++token) sum[token][0] = sum[token][1] = _mm256_setzero_si256();
    for (int quad = 0; quad < kGroup / kQuad; ++quad) {
      for (int part = 0; part < 2; ++part) {
        __m256i weights;
        if constexpr (kind == kPacked4) {
          const auto* from = reinterpret_cast<const __m256i*>(codes + (quad / 2) * 64 + part * 32);
          __m256i both = _mm256_loadu_si256(from);
          if (quad % 2) both = _mm256_srli_epi16(both, 4);
          weights = _mm256_shuffle_epi8(table, _mm256_and_si256(both, low_half));
        } else {
          const auto* from = reinterpret_cast<const __m256i*>(codes + quad * 64 + part * 32);
          weights = _mm256_xor_si256(_mm256_loadu_si256(from), flip);
        }
        const __m256i size = _mm256_abs_epi8(weights);
        for (int token = 0; token < tokens; ++token) {
          int32_t four;
          std::memcpy(&four, inputs.integers.data() + (first + token) * packed.columns + group * kGroup + quad * 4, 4);
          const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(four), weights);
          const __m256i pairs = _mm256_maddubs_epi16(size, x);
          sum[token][part] = _mm256_add_epi32(sum[token][part], _mm256_madd_epi16(pairs, ones));
        }
      }
    }
    for (int token = 0; token < tokens; ++token)
      for (int part = 0; part < 2; ++part) {
        __m256 both = _mm256_set1_ps(inputs.scales[(first + token) * groups + group]);
        if constexpr (kind == kPacked4) {
          const auto* from = reinterpret_cast<const __m128i*>(scales + part * 8);
          both = _mm256_mul_ps(both, _mm256_cvtph_ps(_mm_loadu_si128(from)));
        }
        total[token][part] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[token][part]), both, total[token][part]);
      }
  }
  for (int token = 0; token < tokens; ++token)
    for (int part = 0; part < 2; ++part) {
      if constexpr (kind == kPacked8)
        total[token][part] = _mm256_mul_ps(total[token][part], _mm256_loadu_ps(row_scales + part * 8));
      _mm256_storeu_ps(sums[token] + part * 8, total[token][part]);
    }
#else
  for (int token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < kTile; ++row) sums[token][row] = 0;
  for (int64_t group = 0; group < groups; ++group, codes += group_bytes<kind>(), scales += kTile) {
    for (int token = 0; token < tokens; ++token) {
      const int8_t* x = inputs.integers.data() + (first + token) * packed.columns + group * kGroup;
      int32_t sum[kTile] = {};
      for (int64_t quad = 0; quad < kGroup / kQuad; ++quad) {
        for (int64_t row = 0; row < kTile; ++row) {
          int32_t part = 0;
          for (int64_t i = 0; i < kQuad; ++i) {
            int32_t weight;
            if (kind == kPacked4) {
              const uint8_t both = codes[(quad / 2) * 64 + row * kQuad + i];
              weight = kLevels[quad % 2 ? both >> 4 : both & 15];
            } else {
              weight = static_cast<int32_t>(codes[quad * 64 + row * kQuad + i]) - 128;
            }
            part += weight * x[quad * kQuad + i];
          }
          sum[row] += part;
        }
      }
      const float scale = inputs.scales[(first + token) * groups + group];
      for (int64_t row = 0; row < kTile; ++row)
        sums[token][row] += static_cast<float>(sum[row]) * scale * (kind == kPacked4 ? from_half(scales[row]) : 1.0f);
    }
  }
  if (kind == kPacked8)
    for (int token = 0; token < tokens; ++token)
      for (int64_t row = 0; row < kTile; ++row) sums[token][row] *= row_scales[row];
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// A matrix, its shape, and its share for one thread.

struct Matrix {
  int kind;
  const void* weights;   // rows, or codes where packed
  const void* scales;    // of packed matrices
  const void* bias;      // in the kind of the inputs; may be null
  int64_t rows, columns;
};

bool is_packed(int kind) { return kind == kPacked8 || kind == kPacked4; }

void prepare(Inputs& inputs, int kind) {
  if (is_packed(kind)) quantize_inputs(inputs);
#if LYRA_AVX512 && defined(__AVX512BF16__)
  if (kind == kBFloat16) round_inputs(inputs);
#endif
}

// outputs(token, row) as floats; `unit` counts rows, or tiles where packed.
template <int kind, int tokens>
void multiply_unit(const Matrix& matrix, int64_t unit, const Inputs& inputs, int64_t first, float* outputs) {
  if constexpr (kind == kPacked8 || kind == kPacked4) {
    float sums[tokens][kTile];
    const Packed packed{static_cast<const uint8_t*>(matrix.weights), matrix.scales, matrix.rows, matrix.columns};
    dot_tile<kind, tokens>(packed, unit, inputs, first, sums);
    for (int token = 0; token < tokens; ++token)
      for (int64_t row = unit * kTile; row < std::min(matrix.rows, (unit + 1) * kTile); ++row)
        outputs[(first + token) * matrix.rows + row] = sums[token][row - unit * kTile];
  } else {
    float sums[tokens];
    dot_rows<kind, tokens>(matrix.weights, unit, inputs, first, sums);
    for (int token = 0; token < tokens; ++token) outputs[(first + token) * matrix.rows + unit] = sums[token];
  }
}

template <int kind>
void multiply_units(const Matrix& matrix, int64_t from, int64_t to, const Inputs& inputs, float* outputs) {
#if LYRA_AVX512
  if constexpr (kind != kPacked8 && kind != kPacked4)
    for (; inputs.tokens == 1 && from + kStreams <= to; from += kStreams)
      dot_streams<kind>(matrix.weights, from, inputs, outputs + from);
#endif
  for (int64_t unit = from; unit < to; ++unit) {
    int64_t token = 0;
    for (; token + 4 <= inputs.tokens; token += 4) multiply_unit<kind, 4>(matrix, unit, inputs, token, outputs);
    for (; token + 2 <= inputs.tokens; token += 2) multiply_unit<kind, 2>(matrix, unit, inputs, token, outputs);
    for (; token < inputs.tokens; ++token) multiply_unit<kind, 1>(matrix, unit, inputs, token, outputs);
  }
}

int64_t units(const Matrix& matrix) {
  return is_packed(matrix.kind) ? (matrix.rows + kTile - 1) / kTile : matrix.rows;
}

// The share of thread `number` of `threads`; outputs are (tokens, rows) floats, without the bias.
void multiply(const Matrix& matrix, const Inputs& inputs, float* outputs, int number, int threads) {
  const int64_t all = units(matrix);
  const int64_t from = all * number / threads, to = all * (number + 1) / threads;
  switch (matrix.kind) {
    case kFloat32: return multiply_units<kFloat32>(matrix, from, to, inputs, outputs);
    case kBFloat16: return multiply_units<kBFloat16>(matrix, from, to, inputs, outputs);
    case kFloat16: return multiply_units<kFloat16>(matrix, from, to, inputs, outputs);
    case kPacked8: return multiply_units<kPacked8>(matrix, from, to, inputs, outputs);
    default: return multiply_units<kPacked4>(matrix, from, to, inputs, outputs);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

// The level of each weight, in units of its scale, as the byte that stands for it.
template <int kind>
void encode(const float* values, float inverse, uint8_t* codes) {
  float levels[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) levels[i] = std::min(127.0f, std::max(-127.0f, values[i] * inverse));
  if constexpr (kind == kPacked8) {
    for (int64_t i = 0; i < kGroup; ++i) codes[i] = static_cast<uint8_t>(static_cast<int>(std::nearbyint(levels[i])) + 128);
  } else {
    int32_t found[kGroup] = {};
    for (int code = 1; code < 16; ++code) {
      const float between = 0.5f * static_cast<float>(kLevels[code - 1] + kLevels[code]);
      for (int64_t i = 0; i < kGroup; ++i) found[i] += levels[i] > between;
    }
    for (int64_t i = 0; i < kGroup; ++i) codes[i] = static_cast<uint8_t>(found[i]);
  }
}

template <int kind>
void pack_tile(const void* weights, int from, int64_t rows, int64_t columns, int64_t tile, uint8_t* codes,
               void* scales) {
  const int64_t groups = columns / kGroup;
  float inverses[kTile];
  if constexpr (kind == kPacked8) {
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const int64_t row = tile * kTile + lane;
      float most = 0;
      for (int64_t i = 0; row < rows && i < columns; ++i) most = std::max(most, std::fabs(load(weights, from, row * columns + i)));
      static_cast<float*>(scales)[row] = most / 127.0f;
      inverses[lane] = most > 0 ? 127.0f / most : 0.0f;
    }
  }
  for (int64_t group = 0; group < groups; ++group) {
    uint8_t* to = codes + (tile * groups + group) * group_bytes<kind>();
    std::memset(to, 0, group_bytes<kind>());
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const int64_t row = tile * kTile + lane, at = row * columns + group * kGroup;
      float values[kGroup] = {};
      [[maybe_unused]] float most = 0;
      if (row < rows) {
        if (from == kFloat32) std::memcpy(values, static_cast<const float*>(weights) + at, sizeof values);
        else if (from == kBFloat16)
          for (int64_t i = 0; i < kGroup; ++i) values[i] = from_bf16(static_cast<const uint16_t*>(weights)[at + i]);
        else
          for (int64_t i = 0; i < kGroup; ++i) values[i] = from_half(static_cast<const uint16_t*>(weights)[at + i]);
      }
      if constexpr (kind == kPacked4) {
        for (float value : values) most = std::max(most, std::fabs(value));
        const uint16_t scale = to_half(most / 127.0f);
        static_cast<uint16_t*>(scales)[(tile * groups + group) * kTile + lane] = scale;
        inverses[lane] = from_half(scale) > 0 ? 1.0f / from_half(scale) : 0.0f;
      }
      uint8_t found[kGroup];
      encode<kind>(values, inverses[lane], found);
      for (int64_t quad = 0; quad < kGroup / kQuad; ++quad)
        for (int64_t i = 0; i < kQuad; ++i) {
          const uint8_t code = found[quad * kQuad + i];
          if (kind == kPacked8) to[quad * 64 + lane * kQuad + i] = code;
          else to[(quad / 2) * 64 + lane * kQuad + i] |= static_cast<uint8_t>(quad % 2 ? code << 4 : code);
        }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Unpacking.

// The levels of a group's 16 rows, 32 inputs each.
template <int kind>
void decode(const uint8_t* codes, int8_t (*levels)[kGroup]) {
#if LYRA_AVX512
  const __m512i low_half = _mm512_set1_epi8(15);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels)));
  __m512i quads[8];
  for (int pair = 0; pair < 4; ++pair) {
    if constexpr (kind == kPacked4) {
      const __m512i both = _mm512_loadu_si512(codes + pair * 64);
      quads[2 * pair] = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low_half));
      quads[2 * pair + 1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half));
    } else {
      const __m512i flip = _mm512_set1_epi8(-128);
      quads[2 * pair] = _mm512_xor_si512(_mm512_loadu_si512(codes + pair * 128), flip);
      quads[2 * pair + 1] = _mm512_xor_si512(_mm512_loadu_si512(codes + pair * 128 + 64), flip);
    }
  }
  // Lanes hold four rows' quads; in each, four registers are turned into four rows.
  for (int half = 0; half < 2; ++half) {
    const __m512i* from = quads + 4 * half;
    const __m512i a = _mm512_unpacklo_epi32(from[0], from[1]), b = _mm512_unpackhi_epi32(from[0], from[1]);
    const __m512i c = _mm512_unpacklo_epi32(from[2], from[3]), d = _mm512_unpackhi_epi32(from[2], from[3]);
    const __m512i rows[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                             _mm512_unpackhi_epi64(b, d)};
    for (int row = 0; row < 4; ++row) {
      auto to = [&](int lane) { return reinterpret_cast<__m128i*>(levels[4 * lane + row] + 16 * half); };
      _mm_storeu_si128(to(0), _mm512_extracti32x4_epi32(rows[row], 0));
      _mm_storeu_si128(to(1), _mm512_extracti32x4_epi32(rows[row], 1));
      _mm_storeu_si128(to(2), _mm512_extracti32x4_epi32(rows[row], 2));
      _mm_storeu_si128(to(3), _mm512_extracti32x4_epi32(rows[row], 3));
    }
  }
#else
  for (int64_t quad = 0; quad < kGroup / kQuad; ++quad)
    for (int64_t row = 0; row < kTile; ++row)
      for (int64_t i = 0; i < kQuad; ++i) {
        int level;
        if constexpr (kind == kPacked4) {
          const uint8_t both = codes[(quad / 2) * 64 + row * kQuad + i];
          level = kLevels[quad % 2 ? both >> 4 : both & 15];
        } else {
          level = static_cast<int>(codes[quad * 64 + row * kQuad + i]) - 128;
        }
        levels[row][quad * kQuad + i] = static_cast<int8_t>(level);
      }
#endif
}

// Levels times their scale, as `kind`.
void spread(const int8_t* levels, float scale, void* to, int kind) {
#if LYRA_AVX512
  for (int64_t at = 0; at < kGroup; at += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + at));
    const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_set1_ps(scale));
    if (kind == kFloat32) {
      _mm512_storeu_ps(static_cast<float*>(to) + at, values);
      continue;
    }
    __m256i narrow;
    if (kind == kFloat16) {
      narrow = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
#if defined(__AVX512BF16__)
      narrow = (__m256i)_mm512_cvtneps_pbh(values);
#else
      // To nearest, ties to even; no level is a NaN.
      const __m512i bits = _mm512_castps_si512(values);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + at), narrow);
  }
#else
  for (int64_t i = 0; i < kGroup; ++i) store(to, kind, i, scale * static_cast<float>(levels[i]));
#endif
}

// One tile as 16 rows of `kind`, each `columns` long.
template <int kind>
void unpack_tile(const Matrix& matrix, int64_t tile, void* to, int to_kind) {
  const int64_t groups = matrix.columns / kGroup, size = to_kind == kFloat32 ? 4 : 2;
  const uint8_t* codes = static_cast<const uint8_t*>(matrix.weights) + tile * groups * group_bytes<kind>();
  const uint16_t* scales = static_cast<const uint16_t*>(matrix.scales) + tile * groups * kTile;
  const float* row_scales = static_cast<const float*>(matrix.scales) + tile * kTile;
  alignas(64) int8_t levels[kTile][kGroup];
  for (int64_t group = 0; group < groups; ++group) {
    decode<kind>(codes + group * group_bytes<kind>(), levels);
    for (int64_t row = 0; row < kTile; ++row) {
      const float scale = kind == kPacked4 ? from_half(scales[group * kTile + row]) : row_scales[row];
      spread(levels[row], scale, static_cast<char*>(to) + (row * matrix.columns + group * kGroup) * size, to_kind);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// One decoder layer for one token, as Llama and its kin compute it: norm, attention over the cache, norm, gated MLP.

struct Layer {
  int kind;          // of hidden states, norms, biases, keys and values
  int activation;    // of the gate: 0 is SiLU, 1 is GELU by its tanh form
  int64_t hidden, heads, key_heads, head_size;
  float epsilon, scaling;
  const void *norm, *mlp_norm;          // (hidden,)
  const void *query_norm, *key_norm;    // (head_size,), or null
  Matrix query, key, value, output, gate, up, down;
};

// Rounds to what the model's dtype holds, as the operators of torch do between them.
inline float rounded(float value, int kind) {
  if (kind == kBFloat16) return from_bf16(to_bf16(value));
  return kind == kFloat16 ? from_half(to_half(value)) : value;
}

// x / rms(x), rounded, times the weights, rounded: `LlamaRMSNorm`.
void normalize(const float* x, const void* weights, int kind, int64_t size, float epsilon, float* y) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float factor = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(size)) + epsilon);
  for (int64_t i = 0; i < size; ++i) y[i] = rounded(rounded(x[i] * factor, kind) * load(weights, kind, i), kind);
}

// Turns a head by its position: halves belong together (rotate_half). cos and sin: (head_size,).
void turn(float* head, const float* cosine, const float* sine, int kind, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half];
    head[i] = rounded(rounded(low * cosine[i], kind) + rounded(-high * sine[i], kind), kind);
    head[i + half] = rounded(rounded(high * cosine[i + half], kind) + rounded(low * sine[i + half], kind), kind);
  }
}

float dot(const float* x, const void* row, int kind, int64_t size) {
  float sum = 0;
  int64_t i = 0;
#if LYRA_AVX512
  __m512 total = _mm512_setzero_ps();
  for (; i + 16 <= size; i += 16) {
    const __m512 w = kind == kFloat32 ? _mm512_loadu_ps(static_cast<const float*>(row) + i)
                                      : widen(static_cast<const uint16_t*>(row) + i, kind);
    total = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + i), total);
  }
  sum = _mm512_reduce_add_ps(total);
#endif
  for (; i < size; ++i) sum += x[i] * load(row, kind, i);
  return sum;
}

void add_scaled(float* y, float factor, const void* row, int kind, int64_t size) {
  int64_t i = 0;
#if LYRA_AVX512
  const __m512 by = _mm512_set1_ps(factor);
  for (; i + 16 <= size; i += 16) {
    const __m512 w = kind == kFloat32 ? _mm512_loadu_ps(static_cast<const float*>(row) + i)
                                      : widen(static_cast<const uint16_t*>(row) + i, kind);
    _mm512_storeu_ps(y + i, _mm512_fmadd_ps(w, by, _mm512_loadu_ps(y + i)));
  }
#endif
  for (; i < size; ++i) y[i] += factor * load(row, kind, i);
}

const void* row_of(const void* base, int kind, int64_t at) {
  return static_cast<const char*>(base) + at * (kind == kFloat32 ? 4 : 2);
}

// Softmax over all cached tokens, in float32, for one query head.
void attend(const float* query, const void* keys, const void* values, int kind, int64_t tokens, int64_t size,
            float scaling, float* scores, float* output) {
  float most = -INFINITY;
  for (int64_t t = 0; t < tokens; ++t) {
    scores[t] = scaling * dot(query, row_of(keys, kind, t * size), kind, size);
    most = std::max(most, scores[t]);
  }
  float sum = 0;
  for (int64_t t = 0; t < tokens; ++t) sum += scores[t] = std::exp(scores[t] - most);
  std::fill(output, output + size, 0.0f);
  for (int64_t t = 0; t < tokens; ++t) add_scaled(output, scores[t] / sum, row_of(values, kind, t * size), kind, size);
}

float activated(float x, int which) {
  if (which == 0) return x / (1.0f + std::exp(-x));
  return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}

// Numbers of one layer on their way; shared by its threads.
struct Work {
  Inputs inputs;
  std::vector<float> hidden, normed, query, key, value, attended, scores, gate, up, sums, cosine, sine;
};

// Makes room for all that a layer writes, so that nothing is allocated where threads run.
void reserve(Work& work, const Layer& layer, int64_t tokens, int threads) {
  const int64_t widest = std::max({layer.hidden, layer.heads * layer.head_size, layer.gate.rows});
  work.inputs.values.reserve(widest);
  work.inputs.bf16.reserve(widest);
  work.inputs.integers.reserve(widest);
  work.inputs.scales.reserve(widest / kGroup + 1);
  work.inputs.offsets.reserve(widest / kGroup + 1);
  work.hidden.resize(layer.hidden);
  work.normed.resize(layer.hidden);
  work.query.resize(layer.heads * layer.head_size);
  work.key.resize(layer.key_heads * layer.head_size);
  work.value.resize(layer.key_heads * layer.head_size);
  work.attended.resize(layer.heads * layer.head_size);
  work.scores.resize(static_cast<size_t>(threads) * tokens);
  work.gate.resize(layer.gate.rows);
  work.up.resize(layer.up.rows);
  work.sums.resize(layer.hidden);
  work.cosine.resize(layer.head_size);
  work.sine.resize(layer.head_size);
}

void as_inputs(Inputs& inputs, const std::vector<float>& values, int64_t columns) {
  inputs.tokens = 1;
  inputs.columns = columns;
  inputs.values.assign(values.begin(), values.begin() + columns);
}

void prepare_for(Inputs& inputs, const Matrix& one, const Matrix* two = nullptr, const Matrix* three = nullptr) {
  prepare(inputs, one.kind);
  if (two && two->kind != one.kind) prepare(inputs, two->kind);
  if (three && three->kind != one.kind && (!two || three->kind != two->kind)) prepare(inputs, three->kind);
}

void finish(const Matrix& matrix, float* sums, int kind) {
  for (int64_t row = 0; row < matrix.rows; ++row)
    sums[row] = rounded(sums[row] + (matrix.bias ? load(matrix.bias, kind, row) : 0.0f), kind);
}

}  // namespace

extern "C" {

// Changes with the interface: a library built from other sources is not called.
int lyra_interface() { return kInterface; }

int64_t lyra_most_tokens() { return kMostTokens; }

// y = x W^T + bias. x: (tokens, columns), y: (tokens, rows), both of `kind`; at most `lyra_most_tokens` tokens.
int lyra_linear(const void* x, void* y, int kind, int64_t tokens, const Matrix* matrix, int threads) {
  if (tokens < 1 || tokens > kMostTokens) return 1;
  if (is_packed(matrix->kind) && matrix->columns % kGroup) return 2;
  thread_local Inputs inputs;
  thread_local std::vector<float> outputs;
  try {
    take(inputs, x, kind, tokens, matrix->columns);
    prepare(inputs, matrix->kind);
    outputs.resize(tokens * matrix->rows);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  const Inputs& shared = inputs;
  float* const sums = outputs.data();
  const int64_t rows = matrix->rows;
  in_threads(threads, [&](int number, int of) {
    multiply(*matrix, shared, sums, number, of);
    const int64_t all = units(*matrix), unit = is_packed(matrix->kind) ? kTile : 1;
    const int64_t from = std::min(rows, all * number / of * unit);
    const int64_t to = std::min(rows, all * (number + 1) / of * unit);
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t row = from; row < to; ++row) {
        float value = sums[token * rows + row];
        if (matrix->bias) value += load(matrix->bias, kind, row);
        store(y, kind, token * rows + row, value);
      }
  });
  return 0;
}

// Attention of one token to a cache, as in `lyra_layer`: for measuring it. query, output: (heads, head_size).
int lyra_attend(const void* query, void* output, int kind, const void* keys, const void* values, int64_t heads,
                int64_t key_heads, int64_t tokens, int64_t size, float scaling, int threads) {
  thread_local std::vector<float> own, seen, scores;
  try {
    own.resize(heads * size);
    seen.resize(heads * size);
    scores.resize(static_cast<size_t>(threads) * tokens);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  float *const from = own.data(), *const to = seen.data(), *const weights = scores.data();
  for (int64_t i = 0; i < heads * size; ++i) from[i] = load(query, kind, i);
  in_threads(threads, [&](int number, int of) {
    for (int64_t head = heads * number / of; head < heads * (number + 1) / of; ++head) {
      const int64_t at = head / (heads / key_heads) * tokens * size;
      attend(from + head * size, row_of(keys, kind, at), row_of(values, kind, at), kind, tokens, size, scaling,
             weights + number * tokens, to + head * size);
    }
  });
  for (int64_t i = 0; i < heads * size; ++i) store(output, kind, i, to[i]);
  return 0;
}

// Bytes of a packed matrix: codes, then scales.
int64_t lyra_packed_codes(int kind, int64_t rows, int64_t columns) {
  const int64_t tiles = (rows + kTile - 1) / kTile, groups = columns / kGroup;
  return tiles * groups * (kind == kPacked4 ? group_bytes<kPacked4>() : group_bytes<kPacked8>());
}

int64_t lyra_packed_scales(int kind, int64_t rows, int64_t columns) {
  const int64_t padded = (rows + kTile - 1) / kTile * kTile;
  return kind == kPacked4 ? padded * (columns / kGroup) * 2 : padded * 4;
}

// Packs a matrix of 32- or 16-bit floats. Rows that fill up the last tile are zero.
int lyra_pack(const void* weights, int from, int kind, int64_t rows, int64_t columns, uint8_t* codes, void* scales,
              int threads) {
  if (columns % kGroup || !is_packed(kind)) return 2;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  in_threads(threads, [&](int number, int of) {
    for (int64_t tile = tiles * number / of; tile < tiles * (number + 1) / of; ++tile) {
      if (kind == kPacked8) pack_tile<kPacked8>(weights, from, rows, columns, tile, codes, scales);
      else pack_tile<kPacked4>(weights, from, rows, columns, tile, codes, scales);
    }
  });
  return 0;
}

// Rows `first` to `first + count` of a packed matrix, unpacked to (count, columns) of `to_kind`; both in whole tiles.
int lyra_unpack(const Matrix* matrix, int64_t first, int64_t count, void* to, int to_kind, int threads) {
  if (!is_packed(matrix->kind) || first < 0 || first + count > matrix->rows) return 2;
  if (first % kTile || count % kTile) return 2;
  const int64_t tiles = count / kTile;
  in_threads(threads, [&](int number, int of) {
    for (int64_t tile = tiles * number / of; tile < tiles * (number + 1) / of; ++tile) {
      char* place = static_cast<char*>(to) + tile * kTile * matrix->columns * (to_kind == kFloat32 ? 4 : 2);
      if (matrix->kind == kPacked8) unpack_tile<kPacked8>(*matrix, first / kTile + tile, place, to_kind);
      else unpack_tile<kPacked4>(*matrix, first / kTile + tile, place, to_kind);
    }
  });
  return 0;
}

// One token through one layer.
//
// hidden: (hidden,) of the layer's kind, in and out. cos, sin: (head_size,) of `angle_kind`. keys, values:
// (key_heads, capacity, head_size) of the layer's kind, of which `past` tokens are filled; the token becomes the next.
int lyra_layer(const Layer* layer, void* hidden, const void* cosine, const void* sine, int angle_kind, void* keys,
               void* values, int64_t capacity, int64_t past, int threads) {
  if (past + 1 > capacity) return 1;
  const Matrix* all[] = {&layer->query, &layer->key,  &layer->value, &layer->output,
                         &layer->gate,  &layer->up, &layer->down};
  for (const Matrix* matrix : all)
    if (is_packed(matrix->kind) && matrix->columns % kGroup) return 2;
  thread_local Work own;
  Work& work = own;
  const int kind = layer->kind;
  const int64_t size = layer->head_size, heads = layer->heads, key_heads = layer->key_heads, tokens = past + 1;
  try {
    reserve(work, *layer, tokens, threads);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  for (int64_t i = 0; i < layer->hidden; ++i) work.hidden[i] = load(hidden, kind, i);
  for (int64_t i = 0; i < size; ++i) {
    work.cosine[i] = load(cosine, angle_kind, i);
    work.sine[i] = load(sine, angle_kind, i);
  }
  normalize(work.hidden.data(), layer->norm, kind, layer->hidden, layer->epsilon, work.normed.data());
  as_inputs(work.inputs, work.normed, layer->hidden);
  prepare_for(work.inputs, layer->query, &layer->key, &layer->value);
  in_threads(threads, [&](int number, int of) {
    multiply(layer->query, work.inputs, work.query.data(), number, of);
    multiply(layer->key, work.inputs, work.key.data(), number, of);
    multiply(layer->value, work.inputs, work.value.data(), number, of);
#pragma omp barrier
#pragma omp single
    {
      finish(layer->query, work.query.data(), kind);
      finish(layer->key, work.key.data(), kind);
      finish(layer->value, work.value.data(), kind);
      for (int64_t head = 0; head < heads; ++head) {
        float* at = work.query.data() + head * size;
        if (layer->query_norm) normalize(at, layer->query_norm, kind, size, layer->epsilon, at);
        turn(at, work.cosine.data(), work.sine.data(), kind, size);
      }
      for (int64_t head = 0; head < key_heads; ++head) {
        float* at = work.key.data() + head * size;
        if (layer->key_norm) normalize(at, layer->key_norm, kind, size, layer->epsilon, at);
        turn(at, work.cosine.data(), work.sine.data(), kind, size);
        for (int64_t i = 0; i < size; ++i) {
          store(keys, kind, (head * capacity + past) * size + i, at[i]);
          store(values, kind, (head * capacity + past) * size + i, work.value[head * size + i]);
        }
      }
    }
    for (int64_t head = heads * number / of; head < heads * (number + 1) / of; ++head) {
      const int64_t from = head / (heads / key_heads) * capacity * size;
      attend(work.query.data() + head * size, row_of(keys, kind, from), row_of(values, kind, from), kind, tokens, size,
             layer->scaling, work.scores.data() + number * tokens, work.attended.data() + head * size);
    }
#pragma omp barrier
#pragma omp single
    {
      for (float& value : work.attended) value = rounded(value, kind);
      as_inputs(work.inputs, work.attended, heads * size);
      prepare_for(work.inputs, layer->output);
    }
    multiply(layer->output, work.inputs, work.sums.data(), number, of);
#pragma omp barrier
#pragma omp single
    {
      finish(layer->output, work.sums.data(), kind);
      for (int64_t i = 0; i < layer->hidden; ++i) work.hidden[i] = rounded(work.hidden[i] + work.sums[i], kind);
      normalize(work.hidden.data(), layer->mlp_norm, kind, layer->hidden, layer->epsilon, work.normed.data());
      as_inputs(work.inputs, work.normed, layer->hidden);
      prepare_for(work.inputs, layer->gate, &layer->up);
    }
    multiply(layer->gate, work.inputs, work.gate.data(), number, of);
    multiply(layer->up, work.inputs, work.up.data(), number, of);
#pragma omp barrier
#pragma omp single
    {
      finish(layer->gate, work.gate.data(), kind);
      finish(layer->up, work.up.data(), kind);
    }
    for (int64_t i = layer->gate.rows * number / of; i < layer->gate.rows * (number + 1) / of; ++i)
      work.gate[i] = rounded(rounded(activated(work.gate[i], layer->activation), kind) * work.up[i], kind);
#pragma omp barrier
#pragma omp single
    {
      as_inputs(work.inputs, work.gate, layer->gate.rows);
      prepare_for(work.inputs, layer->down);
    }
    multiply(layer->down, work.inputs, work.sums.data(), number, of);
#pragma omp barrier
#pragma omp single
    {
      finish(layer->down, work.sums.data(), kind);
      for (int64_t i = 0; i < layer->hidden; ++i) store(hidden, kind, i, work.hidden[i] + work.sums[i]);
    }
  });
  return 0;
}

}  // extern "C"
