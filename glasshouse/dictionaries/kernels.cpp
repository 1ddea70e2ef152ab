// The sparse half of a dictionary's training step on a CPU: select, decode and residual, per-latent gradients fused with Adam.
// The dense half (scores = x W_enc + b) is one matrix product done by torch. Every row and every latent is summed by one thread in a
// fixed order, so results do not depend on the number of threads. Plain C++17 and OpenMP; called through ctypes (compiled.py).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

inline float dot(const float* a, const float* b, int64_t d) {
    float sum = 0.f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < d; ++j) sum += a[j] * b[j];
    return sum;
}

inline void axpy(float* out, const float* row, float factor, int64_t d) {
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) out[j] += factor * row[j];
}

// out += f0 r0 + f1 r1 + f2 r2 + f3 r3, in that order: a quarter of the traffic of four calls of axpy.
inline void axpy4(float* out, const float* const rows[4], const float f[4], int64_t d) {
    const float *a = rows[0], *b = rows[1], *c = rows[2], *e = rows[3];
    const float fa = f[0], fb = f[1], fc = f[2], fe = f[3];
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) out[j] += fa * a[j] + fb * b[j] + fc * c[j] + fe * e[j];
}

struct Gather {  // adds factor * row in groups of four
    float* out;
    int64_t d;
    const float* rows[4];
    float factors[4];
    int held = 0;
    Gather(float* out_, int64_t d_) : out(out_), d(d_) {}
    inline void add(const float* row, float factor) {
        rows[held] = row;
        factors[held] = factor;
        if (++held == 4) { axpy4(out, rows, factors, d); held = 0; }
    }
    inline void finish() {
        for (int i = 0; i < held; ++i) axpy(out, rows[i], factors[i], d);
        held = 0;
    }
};

struct Candidate { float weight; int32_t index; };

// The k largest positive weights of one row of n, as ascending indices. Exact: the k-th largest of the maxima of groups is a lower bound.
int top_of_row(const float* z, const float* norms, int64_t n, int64_t k, int64_t width, std::vector<float>& maxima,
               std::vector<float>& scratch, std::vector<Candidate>& found) {
    const int64_t groups = (n + width - 1) / width;
    maxima.resize(groups);
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = g * width, to = std::min(n, from + width);
        float best = 0.f;
#pragma omp simd reduction(max : best)
        for (int64_t j = from; j < to; ++j) best = std::max(best, z[j] * norms[j]);
        maxima[g] = best;
    }
    float bound = 0.f;
    if (groups > k) {
        scratch.assign(maxima.begin(), maxima.end());
        std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
        bound = scratch[k - 1];
    }
    found.clear();
    for (int64_t g = 0; g < groups; ++g) {
        if (maxima[g] < bound || maxima[g] <= 0.f) continue;
        const int64_t from = g * width, to = std::min(n, from + width);
        for (int64_t j = from; j < to; ++j) {
            const float weight = z[j] * norms[j];
            if (weight >= bound && weight > 0.f) found.push_back({weight, static_cast<int32_t>(j)});
        }
    }
    if (static_cast<int64_t>(found.size()) > k) {
        std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), [](const Candidate& a, const Candidate& b) {
            return a.weight > b.weight || (a.weight == b.weight && a.index < b.index);
        });
        found.resize(k);
        std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) { return a.index < b.index; });
    }
    return static_cast<int>(found.size());
}

struct Rates { float lr, beta1, beta2, eps, correction1, correction2; };

inline void adam(float* p, const float* g, float* m, float* v, int64_t d, const Rates& r) {
    const float step = r.lr / r.correction1, root = 1.f / std::sqrt(r.correction2);
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
        m[j] = r.beta1 * m[j] + (1.f - r.beta1) * g[j];
        v[j] = r.beta2 * v[j] + (1.f - r.beta2) * g[j] * g[j];
        p[j] -= step * m[j] / (std::sqrt(v[j]) * root + r.eps);
    }
}

}  // namespace

extern "C" {

// z [rows n], norms [n] -> idx, val [rows k] and count [rows]: the k largest positive z * norm of each row, ascending by index.
void select_topk(const float* z, const float* norms, int64_t rows, int64_t n, int64_t k, int32_t* idx, float* val, int64_t* count, int threads) {
    const int64_t width = n / 64 < 3 * k ? 16 : 64;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> maxima, scratch;
        std::vector<Candidate> found;
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < rows; ++r) {
            const float* row = z + r * n;
            const int held = top_of_row(row, norms, n, k, width, maxima, scratch, found);
            for (int i = 0; i < held; ++i) {
                idx[r * k + i] = found[i].index;
                val[r * k + i] = row[found[i].index];
            }
            count[r] = held;
        }
    }
}

// How many of each row have z * norm > bound (norms may be null: 1); bounds [n], or one number for all when bounds is null.
void count_above(const float* z, const float* norms, const float* bounds, float bound, int64_t rows, int64_t n, int64_t* count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = z + r * n;
        int64_t held = 0;
        if (norms && !bounds) {
#pragma omp simd reduction(+ : held)
            for (int64_t j = 0; j < n; ++j) held += row[j] * norms[j] > bound;
        } else if (bounds) {
#pragma omp simd reduction(+ : held)
            for (int64_t j = 0; j < n; ++j) held += row[j] > bounds[j];
        } else {
#pragma omp simd reduction(+ : held)
            for (int64_t j = 0; j < n; ++j) held += row[j] > bound;
        }
        count[r] = held;
    }
}

// The entries that count_above counted, at row_ptr[r] .. row_ptr[r + 1].
void take_above(const float* z, const float* norms, const float* bounds, float bound, int64_t rows, int64_t n, const int64_t* row_ptr,
                int32_t* idx, float* val, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = z + r * n;
        int64_t at = row_ptr[r];
        const int64_t end = row_ptr[r + 1];
        for (int64_t from = 0; from < n && at < end; from += 32) {
            const int64_t to = std::min(n, from + 32);
            int any = 0;
            if (bounds) {
#pragma omp simd reduction(| : any)
                for (int64_t j = from; j < to; ++j) any |= row[j] > bounds[j];
            } else if (norms) {
#pragma omp simd reduction(| : any)
                for (int64_t j = from; j < to; ++j) any |= row[j] * norms[j] > bound;
            } else {
#pragma omp simd reduction(| : any)
                for (int64_t j = from; j < to; ++j) any |= row[j] > bound;
            }
            if (!any) continue;
            for (int64_t j = from; j < to; ++j) {
                const float weight = norms && !bounds ? row[j] * norms[j] : row[j];
                if (weight > (bounds ? bounds[j] : bound)) { idx[at] = static_cast<int32_t>(j); val[at] = row[j]; ++at; }
            }
        }
    }
}

// The rank-th largest (1-based) of count numbers; values are reordered.
float rank_of(float* values, int64_t count, int64_t rank) {
    std::nth_element(values, values + (rank - 1), values + count, std::greater<float>());
    return values[rank - 1];
}

// Scores of chosen (row, latent) pairs in float32: val = <x_r, W_enc_i> + b_i, where selection was made in a lower precision.
void recompute(const float* x, const float* w_enc, const float* b_enc, int64_t rows, int64_t d_in, const int64_t* row_ptr, const int32_t* idx,
               float* val, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t e = row_ptr[r]; e < row_ptr[r + 1]; ++e) val[e] = dot(x + r * d_in, w_enc + idx[e] * d_in, d_in) + b_enc[idx[e]];
}

// Kinds of activation: what f is, given the score z of a selected entry.
enum Kind { PLAIN = 0, PENALISED = 1, JUMP = 2, GATED = 3 };

// Decode, residual and the entries' gradients, one row at a time. levels > 1: nested prefixes ending at level_end[0 .. levels).
// On return f and dz hold the coefficients of the gradients of W_dec and W_enc, extra that of the threshold (JUMP), residual [rows levels d_out]
// the gradient of the loss with respect to the reconstruction(s), gate_residual [rows d_out] the same for what the gates alone reconstruct (GATED),
// and error [rows levels] the squared errors.
void decode_rows(int kind, int64_t rows, int64_t d_out, int64_t levels, const int64_t* level_end, const int64_t* row_ptr, const int32_t* idx,
                 const float* w_dec, const float* b_dec, const float* y, const float* norms, const float* threshold, const float* b_enc,
                 const float* r_mag, const float* b_mag, float penalty, float bandwidth, float share, const float* z, float* f, float* dz,
                 float* extra, float* extra2, float* residual, float* gate_residual, float* error, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 8)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t from = row_ptr[r], to = row_ptr[r + 1];
            const float* target = y + r * d_out;
            float* all = residual + r * levels * d_out;
            for (int64_t e = from; e < to; ++e) {
                const int32_t i = idx[e];
                if (kind == JUMP) f[e] = z[e] > threshold[i] ? z[e] : 0.f;
                else if (kind == GATED) f[e] = std::max(0.f, (z[e] - b_enc[i]) * std::exp(r_mag[i]) + b_mag[i]);
                else f[e] = z[e];
            }
            int64_t e = from;
            for (int64_t level = 0; level < levels; ++level) {  // cumulative reconstructions minus the target
                float* out = all + level * d_out;
                const float* before = level ? out - d_out : nullptr;
#pragma omp simd
                for (int64_t j = 0; j < d_out; ++j) out[j] = before ? before[j] : b_dec[j] - target[j];
                Gather gather(out, d_out);
                for (; e < to && idx[e] < level_end[level]; ++e)
                    if (f[e] != 0.f) gather.add(w_dec + idx[e] * d_out, f[e]);
                gather.finish();
                error[r * levels + level] = dot(out, out, d_out);
            }
            for (int64_t level = levels - 1; level >= 0; --level) {  // gradient seen by a latent: its level's and all later residuals
                float* out = all + level * d_out;
                const float* later = level + 1 < levels ? out + d_out : nullptr;
#pragma omp simd
                for (int64_t j = 0; j < d_out; ++j) out[j] = 2.f * share * out[j] + (later ? later[j] : 0.f);
            }
            if (kind == GATED) {
                float* guess = gate_residual + r * d_out;
                for (int64_t j = 0; j < d_out; ++j) guess[j] = b_dec[j] - target[j];
                Gather gather(guess, d_out);
                for (int64_t g = from; g < to; ++g) gather.add(w_dec + idx[g] * d_out, z[g]);
                gather.finish();
                for (int64_t j = 0; j < d_out; ++j) guess[j] *= 2.f * share;
            }
            int64_t level = 0;
            for (int64_t g = from; g < to; ++g) {
                const int32_t i = idx[g];
                while (i >= level_end[level]) ++level;
                const float* direction = w_dec + i * d_out;
                const float df = dot(all + level * d_out, direction, d_out);
                if (kind == PLAIN) dz[g] = df;
                else if (kind == PENALISED) dz[g] = df + penalty * share * norms[i];
                else if (kind == JUMP) {
                    const bool near = std::fabs(z[g] - threshold[i]) < 0.5f * bandwidth;
                    dz[g] = f[g] != 0.f ? df : 0.f;
                    extra[g] = near ? -(threshold[i] * df + penalty * share) / bandwidth : 0.f;
                } else {
                    const float scale = std::exp(r_mag[i]);
                    const float magnitude = f[g] > 0.f ? df : 0.f;
                    const float gate = dot(gate_residual + r * d_out, direction, d_out) + penalty * share * norms[i];
                    dz[g] = gate + magnitude * scale;                       // coefficient of x in the gradient of W_enc
                    extra[g] = magnitude;                                   // b_mag
                    extra2[g] = magnitude * scale * (z[g] - b_enc[i]);      // r_mag
                }
            }
        }
    }
}

// Entries by latent: col_ptr [n + 1] and order [entries], the positions of each latent's entries in row order.
void by_latent(const int32_t* idx, int64_t entries, int64_t n, int64_t* col_ptr, int32_t* order) {
    std::fill(col_ptr, col_ptr + n + 1, 0);
    for (int64_t e = 0; e < entries; ++e) ++col_ptr[idx[e] + 1];
    for (int64_t i = 0; i < n; ++i) col_ptr[i + 1] += col_ptr[i];
    std::vector<int64_t> next(col_ptr, col_ptr + n);
    for (int64_t e = 0; e < entries; ++e) order[next[idx[e]]++] = static_cast<int32_t>(e);
}

struct Latents {  // mirrors compiled.Latents, field by field
    int64_t n, d_in, d_out, levels, groups;
    const int64_t* level_end;
    const int64_t* col_ptr;
    const int32_t* order;
    const int32_t* row_of;
    const float *z, *f, *dz, *extra, *extra2, *x, *residual, *gate_residual;
    float penalty;  // times share
    int kind;
    float *w_dec, *w_enc, *b_enc, *vec, *vec2;          // vec: threshold or b_mag; vec2: r_mag
    float *m_dec, *v_dec, *m_enc, *v_enc, *m_b, *v_b, *m_vec, *v_vec, *m_vec2, *v_vec2;
    const int32_t* aux_row;                             // [n], row in the aux gradients or -1; may be null
    const float *aux_dec, *aux_enc, *aux_b;
    float *g_dec, *g_enc, *g_b, *g_vec, *g_vec2;        // not null: write gradients and leave parameters alone
    float *norms;                                       // new norms (sum over `groups` parts of a row)
    int64_t* fired;                                     // entries with f != 0
    float lr, beta1, beta2, eps, correction1, correction2;
};

void update_latents(const Latents* now, int threads) {
    const Latents& s = *now;
    const Rates rates{s.lr, s.beta1, s.beta2, s.eps, s.correction1, s.correction2};
    const bool apply = s.g_dec == nullptr;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> dec(s.d_out), enc(s.d_in);
#pragma omp for schedule(dynamic, 16)
        for (int64_t i = 0; i < s.n; ++i) {
            float* gd = apply ? dec.data() : s.g_dec + i * s.d_out;
            float* ge = apply ? enc.data() : s.g_enc + i * s.d_in;
            std::fill(gd, gd + s.d_out, 0.f);
            std::fill(ge, ge + s.d_in, 0.f);
            float gb = 0.f, gv = 0.f, gv2 = 0.f, total = 0.f;
            int64_t level = 0, fired = 0;
            while (i >= s.level_end[level]) ++level;
            float* row = s.w_dec + i * s.d_out;
            Gather to_dec(gd, s.d_out), to_enc(ge, s.d_in);
            for (int64_t c = s.col_ptr[i]; c < s.col_ptr[i + 1]; ++c) {
                const int32_t e = s.order[c];
                const int64_t r = s.row_of[e];
                if (s.f[e] != 0.f) { to_dec.add(s.residual + (r * s.levels + level) * s.d_out, s.f[e]); ++fired; }
                if (s.dz[e] != 0.f) to_enc.add(s.x + r * s.d_in, s.dz[e]);
                if (s.kind == GATED) {  // dz splits into the gate's part, which moves b_enc, and the magnitude's, which does not
                    to_dec.add(s.gate_residual + r * s.d_out, s.z[e]);
                    gb += s.dz[e] - s.extra[e] * std::exp(s.vec2[i]);
                    gv += s.extra[e];
                    gv2 += s.extra2[e];
                    total += s.z[e];
                } else {
                    gb += s.dz[e];
                    if (s.extra) gv += s.extra[e];
                    total += s.f[e];
                }
            }
            to_dec.finish();
            to_enc.finish();
            if (s.penalty != 0.f && (s.kind == PENALISED || s.kind == GATED)) {
                for (int64_t part = 0, d = s.d_out / s.groups; part < s.groups; ++part) {
                    const float norm = std::sqrt(dot(row + part * d, row + part * d, d));
                    if (norm > 0.f) axpy(gd + part * d, row + part * d, s.penalty * total / norm, d);
                }
            }
            if (s.aux_row && s.aux_row[i] >= 0) {
                const int64_t a = s.aux_row[i];
                axpy(gd, s.aux_dec + a * s.d_out, 1.f, s.d_out);
                axpy(ge, s.aux_enc + a * s.d_in, 1.f, s.d_in);
                gb += s.aux_b[a];
            }
            s.fired[i] = fired;
            if (!apply) {
                s.g_b[i] = gb;
                if (s.g_vec) s.g_vec[i] = gv;
                if (s.g_vec2) s.g_vec2[i] = gv2;
                continue;
            }
            adam(row, gd, s.m_dec + i * s.d_out, s.v_dec + i * s.d_out, s.d_out, rates);
            adam(s.w_enc + i * s.d_in, ge, s.m_enc + i * s.d_in, s.v_enc + i * s.d_in, s.d_in, rates);
            adam(s.b_enc + i, &gb, s.m_b + i, s.v_b + i, 1, rates);
            if (s.vec) adam(s.vec + i, &gv, s.m_vec + i, s.v_vec + i, 1, rates);
            if (s.vec2) adam(s.vec2 + i, &gv2, s.m_vec2 + i, s.v_vec2 + i, 1, rates);
            float norm = 0.f;
            for (int64_t part = 0, d = s.d_out / s.groups; part < s.groups; ++part)
                norm += std::sqrt(dot(row + part * d, row + part * d, d));
            s.norms[i] = norm;
        }
    }
}

// Adam from gradients that update_latents wrote (and others may have summed since), each times factor.
void apply_gradients(const Latents* now, float factor, int threads) {
    const Latents& s = *now;
    const Rates rates{s.lr, s.beta1, s.beta2, s.eps, s.correction1, s.correction2};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < s.n; ++i) {
        float* gd = s.g_dec + i * s.d_out;
        float* ge = s.g_enc + i * s.d_in;
        if (factor != 1.f) {
            for (int64_t j = 0; j < s.d_out; ++j) gd[j] *= factor;
            for (int64_t j = 0; j < s.d_in; ++j) ge[j] *= factor;
        }
        const float gb = s.g_b[i] * factor;
        float* row = s.w_dec + i * s.d_out;
        adam(row, gd, s.m_dec + i * s.d_out, s.v_dec + i * s.d_out, s.d_out, rates);
        adam(s.w_enc + i * s.d_in, ge, s.m_enc + i * s.d_in, s.v_enc + i * s.d_in, s.d_in, rates);
        adam(s.b_enc + i, &gb, s.m_b + i, s.v_b + i, 1, rates);
        if (s.vec) { const float g = s.g_vec[i] * factor; adam(s.vec + i, &g, s.m_vec + i, s.v_vec + i, 1, rates); }
        if (s.vec2) { const float g = s.g_vec2[i] * factor; adam(s.vec2 + i, &g, s.m_vec2 + i, s.v_vec2 + i, 1, rates); }
        float norm = 0.f;
        for (int64_t part = 0, d = s.d_out / s.groups; part < s.groups; ++part) norm += std::sqrt(dot(row + part * d, row + part * d, d));
        s.norms[i] = norm;
    }
}

}  // extern "C"
