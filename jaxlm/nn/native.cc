// Decoding on a CPU: products of a few rows with bfloat16 weights, and attention of a few queries to a bfloat16 cache.
//
// Both take as long as memory gives what they read, once. `native.py` compiles this file and says what arrays are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // of a vector register, in floats
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kColumns = 16, kVectors = kColumns / kWidth;  // of a block of weights
constexpr int64_t kBytes = 128 * 1024;                      // that a thread takes at a time
constexpr float kHidden = -1e29f;                           // to the score of a key that is not seen, less is added

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth), aligned(4)));  // of two bfloat16s each

// Call work(0), .., work(count - 1) on this thread and on all of the pool that have nothing else to do.
template <typename Work>
void share(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();  // a thread may come when all is done, and this call has returned
  auto help = [progress, count, work] {
    for (int64_t i; (i = progress->next++) < count; progress->done++) work(i);
  };
  for (int64_t others = std::min(pool.num_threads(), count) - 1; others > 0; others--) {
    auto copy = help;
    pool.Schedule(std::move(copy));
  }
  help();
  while (progress->done < count) std::this_thread::yield();
}

float wide(uint16_t bits) {
  uint32_t word = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

// Two neighbours in a row of bfloat16s, as they are multiplied with the two of each column.
#ifdef __AVX512BF16__
typedef uint32_t Pair;
Pair pair(uint32_t word) { return word; }
Floats add_products(Floats sum, Pair x, Words w) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
}
#else
struct Pair {
  float low, high;
};
Pair pair(uint32_t word) { return {wide(word), wide(word >> 16)}; }
Floats add_products(Floats sum, Pair x, Words w) {
  sum += x.low * (Floats)(w << 16);
  return sum + x.high * (Floats)(w & 0xffff0000u);
}
#endif

// R rows x[R, pairs] with C blocks of weights w[C, pairs, kColumns]: y[R, C kColumns], of which `columns` exist.
template <int R, int C>
void tile(const Pair* x, int64_t pairs, const Words* w, float* y, int64_t stride, int64_t columns) {
  Floats sums[R][C * kVectors] = {};
  for (int64_t p = 0; p < pairs; p++)
    for (int c = 0; c < C; c++)
      for (int v = 0; v < kVectors; v++) {
        Words column = w[(c * pairs + p) * kVectors + v];
        for (int r = 0; r < R; r++)
          sums[r][c * kVectors + v] = add_products(sums[r][c * kVectors + v], x[r * pairs + p], column);
      }
  size_t bytes = sizeof(float) * std::min<int64_t>(columns, C * kColumns);
  for (int r = 0; r < R; r++) std::memcpy(y + r * stride, sums[r], bytes);
}

// As many of the rows as come R at a time, with all blocks, C at a time; how many rows that are.
template <int R, int C>
int64_t tiles(const Pair* x, int64_t rows, int64_t pairs, const Words* w, int64_t blocks, float* y, int64_t stride,
              int64_t columns) {
  int64_t row = 0;
  for (; row + R <= rows; row += R)
    for (int64_t block = 0; block < blocks;) {
      bool all = block + C <= blocks;
      (all ? tile<R, C> : tile<R, 1>)(x + row * pairs, pairs, w + block * pairs * kVectors,
                                      y + row * stride + block * kColumns, stride, columns - block * kColumns);
      block += all ? C : 1;
    }
  return row;
}

ffi::Error Product(ffi::ThreadPool pool, ffi::BufferR2<ffi::BF16> x, ffi::BufferR3<ffi::U32> w,
                   ffi::ResultBufferR2<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], pairs = w.dimensions()[1], blocks = w.dimensions()[0], N = y->dimensions()[1];
  if (x.dimensions()[1] != 2 * pairs || w.dimensions()[2] != kColumns || y->dimensions()[0] != rows ||
      (N + kColumns - 1) / kColumns != blocks)
    return ffi::Error::InvalidArgument("jaxlm_product: rows, weights and result do not fit");
  std::vector<Pair> xs(rows * pairs);
  std::transform(static_cast<uint32_t*>(x.untyped_data()), static_cast<uint32_t*>(x.untyped_data()) + rows * pairs,
                 xs.begin(), pair);
  const Pair* first_x = xs.data();
  const Words* ws = static_cast<const Words*>(w.untyped_data());
  float* ys = y->typed_data();
  constexpr int64_t few = 4;  // blocks, which stay in the cache of a core while rows are many
  int64_t some = std::max<int64_t>(1, kBytes / (pairs * 4 * kColumns + 1) / few) * few;
  share(pool, (blocks + some - 1) / some, [=](int64_t i) {
    for (int64_t block = i * some; block < std::min(blocks, (i + 1) * some); block += few) {
      int64_t row = 0;
      auto next = [&](auto multiply) {
        row += multiply(first_x + row * pairs, rows - row, pairs, ws + block * pairs * kVectors,
                     std::min(few, blocks - block), ys + row * N + block * kColumns, N, N - block * kColumns);
      };
#ifdef __AVX512F__
      next(tiles<8, 2>);  // sums fill half of 32 registers
#endif
      next(tiles<4, kVectors == 1 ? 2 : 1>);
      next(tiles<2, kVectors == 1 ? 4 : 2>);
      next(tiles<1, 4>);
    }
  });
  return ffi::Error::Success();
}

// Attention of R queries to one head's keys and values, each read once; rows of `added` are `step` apart.
template <int R>
void mix(const float* queries, const uint16_t* keys, const uint16_t* values, const float* added, int64_t step,
         int64_t S, int64_t H, float cap, float* mixed) {
  int64_t first = S, last = 0;  // of all that any of them sees
  for (int r = 0; r < R; r++) {
    const float* add = added + r * step;
    int64_t from = 0, to = S;
    while (from < S && add[from] < kHidden) from++;
    if (from == S) from = 0;  // nothing is seen: all alike, as in a sum of hidden scores
    else while (add[to - 1] < kHidden) to--;
    first = std::min(first, from), last = std::max(last, to);
  }

  thread_local std::vector<float> shares;  // [S, R]
  shares.resize(S * R);
  float most[R], total[R] = {};
  std::fill(most, most + R, -INFINITY);
  for (int64_t s = first; s < last; s++) {
    const uint16_t* key = keys + s * H;
    float scores[R] = {};
    for (int64_t h = 0; h < H; h++)
      for (int r = 0; r < R; r++) scores[r] += queries[r * H + h] * wide(key[h]);
    for (int r = 0; r < R; r++) {
      float score = cap > 0 ? cap * std::tanh(scores[r] / cap) : scores[r];
      shares[s * R + r] = score + added[r * step + s];
      most[r] = std::max(most[r], shares[s * R + r]);
    }
  }
  for (int64_t s = first; s < last; s++)
    for (int r = 0; r < R; r++) total[r] += shares[s * R + r] = std::exp(shares[s * R + r] - most[r]);
  std::fill(mixed, mixed + R * H, 0.0f);
  for (int64_t s = first; s < last; s++) {
    const uint16_t* value = values + s * H;
    float parts[R];
    for (int r = 0; r < R; r++) parts[r] = shares[s * R + r] / total[r];
    for (int64_t h = 0; h < H; h++)
      for (int r = 0; r < R; r++) mixed[r * H + h] += parts[r] * wide(value[h]);
  }
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> q, ffi::BufferR4<ffi::U16> k,
                  ffi::BufferR4<ffi::U16> v, ffi::BufferR4<ffi::F32> more, float cap, ffi::ResultBufferR4<ffi::F32> y) {
  int64_t B = q.dimensions()[0], K = q.dimensions()[1], R = q.dimensions()[2], H = q.dimensions()[3];
  int64_t S = k.dimensions()[2], some = std::max<int64_t>(1, kBytes / (S * H * 4 + 1));
  auto one_or = [](int64_t n, int64_t size) { return n == 1 || n == size; };
  auto held = [&](auto& x) {
    return x.dimensions()[0] == B && x.dimensions()[1] == K && x.dimensions()[2] == S && x.dimensions()[3] == H;
  };
  if (!held(k) || !held(v) || !one_or(more.dimensions()[0], B) || !one_or(more.dimensions()[1], K) ||
      !one_or(more.dimensions()[2], R) || more.dimensions()[3] != S)
    return ffi::Error::InvalidArgument("jaxlm_attend: queries, keys, values and what is added do not fit");
  const float *queries = q.typed_data(), *added = more.typed_data();
  const uint16_t *keys = k.typed_data(), *values = v.typed_data();
  int64_t step_b = more.dimensions()[0] > 1, step_k = more.dimensions()[1] > 1, step_r = more.dimensions()[2] > 1;
  int64_t more_k = more.dimensions()[1], more_r = more.dimensions()[2];
  float* out = y->typed_data();

  share(pool, (B * K + some - 1) / some, [=](int64_t i) {
    for (int64_t bk = i * some; bk < std::min(B * K, (i + 1) * some); bk++) {
      const float* add = added + S * ((bk / K) * step_b * more_k + (bk % K) * step_k) * more_r;
      for (int64_t r = 0, rows; r < R; r += rows) {
        rows = R - r >= 4 ? 4 : R - r >= 2 ? 2 : 1;
        (rows == 4 ? mix<4> : rows == 2 ? mix<2> : mix<1>)(
            queries + (bk * R + r) * H, keys + bk * S * H, values + bk * S * H, add + S * r * step_r, S * step_r, S, H,
            cap, out + (bk * R + r) * H);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlm_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR3<ffi::U32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlm_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::U16>>()
                                  .Arg<ffi::BufferR4<ffi::U16>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("cap")
                                  .Ret<ffi::BufferR4<ffi::F32>>());
