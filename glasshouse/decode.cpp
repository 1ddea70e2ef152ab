// One decode step of a plain Llama or Qwen3 in float32: a token a row through all layers, one call (decoding.py, by ctypes).
// Weights come in panels of LANES columns, [in LANES] one after the other. Up to six rows meet up to eight panels at once, and their sums stay in
// registers. Every row is summed in the same order whatever its batch and the number of threads. Plain C++17 with vector types, and OpenMP.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {

struct Layer {
    const float *qkv, *out, *gate, *up, *down;  // panels
    const float *q_norm, *k_norm;               // [head_dim], or null
    float* cache;                               // [rows 2*kv_heads room head_dim]: keys, then values
    const float *after_attention, *after_mlp;   // what edits add, or null; row r's begins at r * stride
    int64_t attention_stride, mlp_stride;
};

struct Step {
    int64_t rows, d_model, d_mlp, heads, kv_heads, head_dim, n_layers, vocabulary, room, read;
    int64_t rotary_stride, embedding_stride;
    float epsilon;
    int threads;
    const float *embedding, *head, *rotary;  // [vocabulary d_model], panels, [room rotary_stride]: cosine and sine of each pair first
    const float* blocked;                    // added to scores, [rows room], or null
    const float* after_embedding;            // as in Layer; embedding_stride is its stride
    const Layer* layers;
    const int64_t *tokens, *positions;  // [rows]
    float *x, *mixed, *inner;           // work space [rows d_model], [rows (heads + 2*kv_heads)*head_dim], [rows max(heads*head_dim, d_mlp)]
    float* logits;                      // [rows vocabulary]
};

}  // extern "C"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int MOST_ROWS = 6, MOST_SUMS = 12;
constexpr int PANELS_FOR[MOST_ROWS + 1] = {0, 8, 6, 4, 3, 2, 2};  // panels at once for so many rows: sums, factors and weights fit 16 registers
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void keep(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }

// The same vector, in a register: else the compiler may load it again for every use.
inline vec pinned(vec v) {
#if defined(__x86_64__) && defined(__AVX__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
    return sum;
}

// e^x to about 1e-7 of its value: 2^k times a polynomial in |r| <= ln(2)/2 (as in Cephes). 0 below -87, no more than e^88; NaN stays NaN.
inline float exponential(float x) {
    const float low = x < -87.f ? -87.f : x, y = low > 88.f ? 88.f : low;
    const float k = std::nearbyint(y * 1.44269504f);
    const float r = (y - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(k) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.f ? 0.f : p * power;
}

// ROWS rows of x times PANELS panels: sums [ROWS PANELS*LANES].
template <int ROWS, int PANELS>
void tile(const float* x, int64_t in, const float* panels, float* sums) {
    vec held[ROWS][PANELS];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) held[r][p] = vec{};
    for (int64_t k = 0; k < in; ++k) {
        vec weights[PANELS];
#pragma GCC unroll 8
        for (int p = 0; p < PANELS; ++p) weights[p] = ROWS > 1 ? pinned(load(panels + (p * in + k) * LANES)) : load(panels + (p * in + k) * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const float factor = x[r * in + k];
#pragma GCC unroll 8
            for (int p = 0; p < PANELS; ++p) held[r][p] += factor * weights[p];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PANELS; ++p) keep(sums + (r * PANELS + p) * LANES, held[r][p]);
}

using Tile = void (*)(const float*, int64_t, const float*, float*);

template <int ROWS, int PANELS = PANELS_FOR[ROWS]>
Tile tile_of(int64_t panels) {
    if constexpr (PANELS > 1) {
        if (panels < PANELS) return tile_of<ROWS, PANELS - 1>(panels);
    }
    return tile<ROWS, PANELS>;
}

inline Tile tile_for(int64_t rows, int64_t panels) {
    switch (rows) {
        case 1: return tile_of<1>(panels);
        case 2: return tile_of<2>(panels);
        case 3: return tile_of<3>(panels);
        case 4: return tile_of<4>(panels);
        case 5: return tile_of<5>(panels);
        default: return tile_of<6>(panels);
    }
}

// x [rows in] times matrices of one shape, shared among the threads by panels: finish(row, column, count, sums, sums of the second matrix).
template <int MATRICES, class Finish>
inline void product(const float* x, int64_t rows, int64_t in, const float* const (&matrices)[MATRICES], int64_t out, Finish finish) {
    const int64_t blocks = (rows + MOST_ROWS - 1) / MOST_ROWS, most = PANELS_FOR[(rows + blocks - 1) / blocks];
    const int64_t panels = (out + LANES - 1) / LANES, groups = (panels + most - 1) / most;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = panels * g / groups, width = panels * (g + 1) / groups - first, column = first * LANES;
        const int64_t count = std::min<int64_t>(width * LANES, out - column);
        alignas(64) float sums[MATRICES][MOST_SUMS * LANES];
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
            const Tile multiply = tile_for(to - from, width);
            for (int m = 0; m < MATRICES; ++m) multiply(x + from * in, in, matrices[m] + column * in, sums[m]);
            for (int64_t r = from; r < to; ++r) {
                const int64_t at = (r - from) * width * LANES;
                finish(r, column, count, sums[0] + at, sums[MATRICES - 1] + at);
            }
        }
    }
}

// 1 / root mean square of each row: norm weights stand in the matrix that follows, so the product is scaled in the place of its input.
inline void measure(const float* x, int64_t rows, int64_t n, float epsilon, float* scale) {
    for (int64_t r = 0; r < rows; ++r) scale[r] = 1.f / std::sqrt(dot(x + r * n, x + r * n, n) / n + epsilon);
}

inline void turn(float* head, const float* norm, const float* rotary, int64_t n, float epsilon) {
    if (norm) {
        const float scale = 1.f / std::sqrt(dot(head, head, n) / n + epsilon);
        for (int64_t j = 0; j < n; ++j) head[j] *= scale * norm[j];
    }
    for (int64_t j = 0; j + 1 < n; j += 2) {
        const float a = head[j], b = head[j + 1], c = rotary[j], s = rotary[j + 1];
        head[j] = a * c - b * s;
        head[j + 1] = a * s + b * c;
    }
}

// out = weights [count] times values [count n].
inline void mix(const float* weights, const float* values, int64_t count, int64_t n, float* out) {
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) {
        vec sums[4] = {};
        for (int64_t t = 0; t < count; ++t)
            for (int i = 0; i < 4; ++i) sums[i] += weights[t] * load(values + t * n + j + i * LANES);
        for (int i = 0; i < 4; ++i) keep(out + j + i * LANES, sums[i]);
    }
    for (; j + LANES <= n; j += LANES) {
        vec sum = {};
        for (int64_t t = 0; t < count; ++t) sum += weights[t] * load(values + t * n + j);
        keep(out + j, sum);
    }
    for (; j < n; ++j) {
        float sum = 0.f;
        for (int64_t t = 0; t < count; ++t) sum += weights[t] * values[t * n + j];
        out[j] = sum;
    }
}

// The queries that share one key head, of one row: rotate, write key and value into the cache, attend to all that is there.
inline void attend(const Step& s, const Layer& layer, int64_t row, int64_t head, float* scores) {
    const int64_t n = s.head_dim, group = s.heads / s.kv_heads, count = s.read + 1;
    float* mixed = s.mixed + row * (s.heads + 2 * s.kv_heads) * n;
    float *key = mixed + (s.heads + head) * n, *value = mixed + (s.heads + s.kv_heads + head) * n;
    float* keys = layer.cache + (row * 2 * s.kv_heads + head) * s.room * n;
    float* values = keys + s.kv_heads * s.room * n;
    const float* rotary = s.rotary + s.positions[row] * s.rotary_stride;
    const float* blocked = s.blocked ? s.blocked + row * s.room : nullptr;
    const float factor = 1.f / std::sqrt(static_cast<float>(n));
    turn(key, layer.k_norm, rotary, n, s.epsilon);
    std::memcpy(keys + s.read * n, key, n * sizeof(float));
    std::memcpy(values + s.read * n, value, n * sizeof(float));
    for (int64_t g = head * group; g < (head + 1) * group; ++g) {
        float* query = mixed + g * n;
        turn(query, layer.q_norm, rotary, n, s.epsilon);
        for (int64_t t = 0; t < count; ++t) scores[t] = factor * dot(query, keys + t * n, n) + (blocked ? blocked[t] : 0.f);
        float best = scores[0], total = 0.f;
        for (int64_t t = 1; t < count; ++t) best = scores[t] > best ? scores[t] : best;
#pragma omp simd reduction(+ : total)
        for (int64_t t = 0; t < count; ++t) {
            scores[t] = exponential(scores[t] - best);
            total += scores[t];
        }
        for (int64_t t = 0; t < count; ++t) scores[t] /= total;
        mix(scores, values, count, n, s.inner + (row * s.heads + g) * n);
    }
}

inline void add(float* x, const float* values, int64_t stride, int64_t row, int64_t column, int64_t count) {
    if (!values) return;
    const float* from = values + row * stride + column;
    for (int64_t j = 0; j < count; ++j) x[j] += from[j];
}

// One layer; called by every thread of the team, which meet after each loop.
inline void pass(const Step& s, const Layer& layer, float* scale, float* scores) {
    const int64_t rows = s.rows, d = s.d_model, width = (s.heads + 2 * s.kv_heads) * s.head_dim;
    measure(s.x, rows, d, s.epsilon, scale);
    product<1>(s.x, rows, d, {layer.qkv}, width, [&](int64_t r, int64_t column, int64_t count, const float* sums, const float*) {
        for (int64_t j = 0; j < count; ++j) s.mixed[r * width + column + j] = scale[r] * sums[j];
    });
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * s.kv_heads; ++i) attend(s, layer, i / s.kv_heads, i % s.kv_heads, scores);
    const auto onto = [&](const float* added, int64_t stride) {
        return [&s, added, stride](int64_t r, int64_t column, int64_t count, const float* sums, const float*) {
            float* x = s.x + r * s.d_model + column;
            for (int64_t j = 0; j < count; ++j) x[j] += sums[j];
            add(x, added, stride, r, column, count);
        };
    };
    product<1>(s.inner, rows, s.heads * s.head_dim, {layer.out}, d, onto(layer.after_attention, layer.attention_stride));
    measure(s.x, rows, d, s.epsilon, scale);
    product<2>(s.x, rows, d, {layer.gate, layer.up}, s.d_mlp, [&](int64_t r, int64_t column, int64_t count, const float* gate, const float* up) {
        float* inner = s.inner + r * s.d_mlp + column;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
            const float g = scale[r] * gate[j];
            inner[j] = g / (1.f + exponential(-g)) * (scale[r] * up[j]);
        }
    });
    product<1>(s.inner, rows, s.d_mlp, {layer.down}, d, onto(layer.after_mlp, layer.mlp_stride));
}

}  // namespace

extern "C" {

int64_t panel_width() { return LANES; }

// matrix [out in] -> panels; the last is filled up with zeros.
void pack(const float* matrix, int64_t out, int64_t in, float* panels) {
    for (int64_t column = 0; column < out; column += LANES, panels += in * LANES) {
        for (int64_t j = 0; j < LANES; ++j) {
            const float* row = column + j < out ? matrix + (column + j) * in : nullptr;
            for (int64_t k = 0; k < in; ++k) panels[k * LANES + j] = row ? row[k] : 0.f;
        }
    }
}

// 0; or 1 where a token is not in the vocabulary, 2 where there is no room for another position.
int decode(const Step* step) {
    const Step& s = *step;
    for (int64_t r = 0; r < s.rows; ++r) {
        if (s.tokens[r] < 0 || s.tokens[r] >= s.vocabulary) return 1;
        if (s.read < 0 || s.read >= s.room || s.positions[r] < 0 || s.positions[r] >= s.room) return 2;
    }
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> scale(s.rows), scores(s.read + 1);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < s.rows; ++r) {
            std::memcpy(s.x + r * s.d_model, s.embedding + s.tokens[r] * s.d_model, s.d_model * sizeof(float));
            add(s.x + r * s.d_model, s.after_embedding, s.embedding_stride, r, 0, s.d_model);
        }
        for (int64_t i = 0; i < s.n_layers; ++i) pass(s, s.layers[i], scale.data(), scores.data());
        measure(s.x, s.rows, s.d_model, s.epsilon, scale.data());
        product<1>(s.x, s.rows, s.d_model, {s.head}, s.vocabulary, [&](int64_t r, int64_t column, int64_t count, const float* sums, const float*) {
            for (int64_t j = 0; j < count; ++j) s.logits[r * s.vocabulary + column + j] = scale[r] * sums[j];
        });
    }
    return 0;
}

}  // extern "C"
