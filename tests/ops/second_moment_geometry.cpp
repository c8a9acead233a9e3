// Every tile, chunk, row and shared-memory bank of the second moment's kernels, counted. Prints nothing where all is
// right; test_second_moment_geometry.py builds and runs it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "second_moment/fragments.h"
#include "second_moment/schedule.h"
#include "second_moment/sm90_layout.h"

using namespace pyrewrite;

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                             \
    }                                                                           \
  } while (false)

void triangle() {
  int next = 0;
  for (int column = 0; column < 600; ++column)
    for (int row = 0; row <= column; ++row, ++next) {
      const TriangleTile tile = triangle_tile(next);
      CHECK(tile.row == row && tile.column == column);
    }
  CHECK(next == triangle_tiles(600));
}

// Greedy, one block at a time.
std::int64_t simulated(std::int64_t first, std::int64_t a, std::int64_t second, std::int64_t b, int resident) {
  std::vector<std::int64_t> free(resident);
  std::int64_t end = 0;
  for (std::int64_t block = 0; block < first + second; ++block) {
    auto place = std::min_element(free.begin(), free.end());
    *place += block < first ? a : b;
    end = std::max(end, *place);
  }
  return end;
}

void plans() {
  for (int resident : {1, 3, 7})
    for (int first : {0, 1, 3, 8, 22})
      for (int second : {0, 1, 2, 7, 30})
        for (int a : {3, 9, 10})
          for (int b : {2, 3, 16})
            CHECK(finish_time(first, a, second, b, resident) == simulated(first, a, second, b, resident));
  for (int side : {1, 2, 3, 4, 5, 8, 11, 16, 17, 32})
    for (int resident : {1, 40, 108, 132, 264, 396, 660})
      for (std::int64_t rows : {1, 255, 256, 257, 5000, 70000, 1 << 20})
        for (int on : {2, 3}) {
          const Plan plan = make_plan(side, rows, resident, on);
          CHECK(plan.chunks == (rows + kChunkRows - 1) / kChunkRows);
          CHECK(plan.tiles() == triangle_tiles(side));
          std::set<std::pair<int, int>> places;
          for (int tile = 0; tile < plan.tiles(); ++tile) {
            const TriangleTile at = plan.place(tile);
            CHECK(0 <= at.row && at.row <= at.column && at.column < side);
            CHECK((at.row == at.column) == (tile >= plan.beside()));
            places.insert({at.row, at.column});
          }
          CHECK(static_cast<int>(places.size()) == plan.tiles());
          std::vector<std::vector<int>> seen(plan.tiles(), std::vector<int>(plan.chunks));
          std::vector<std::set<int>> blocks(plan.tiles());
          for (int block = 0; block < plan.blocks(); ++block) {
            const BlockWork work = plan.work(block);
            CHECK(work.first < plan.chunks);  // no block is idle
            for (int chunk = work.first; chunk < plan.chunks; chunk += work.step) ++seen[work.tile][chunk];
            blocks[work.tile].insert(block);
          }
          for (int tile = 0; tile < plan.tiles(); ++tile) {
            for (int count : seen[tile]) CHECK(count == 1);
            std::set<int> read;  // by the reduction
            for (int part = 0; part < plan.parts_of(tile); ++part)
              read.insert(plan.first_of(tile) + part * plan.step_of(tile));
            CHECK(read == blocks[tile]);
          }
          if (rows < 1 << 20) continue;
          // With much to do little of the GPU waits for the last block.
          const auto length = [&](int parts) { return (plan.chunks + parts - 1) / parts; };
          const std::int64_t end = finish_time(plan.beside() * plan.parts_beside, 3 * length(plan.parts_beside),
                                               side * plan.parts_on, on * length(plan.parts_on), resident);
          const double work = static_cast<double>(plan.chunks) * (3 * plan.beside() + on * side);
          CHECK(work > 0.88 * resident * end);
        }
}

void division() {
  std::vector<std::uint32_t> divisors;
  for (std::uint32_t d = 1; d < 3000; ++d) divisors.push_back(d);
  for (std::uint32_t d : {4095u, 4096u, 4097u, 65535u, 65536u, 1000003u, 1u << 29, (1u << 30) - 1, 1u << 30})
    divisors.push_back(d);
  for (std::uint32_t d : divisors) {
    const Divider divide = make_divider(d);
    for (std::uint32_t n = 0; n < 3000; ++n) CHECK(divide(n) == n / d);
    for (std::uint64_t at = d; at < 0x7fffff00u; at += at / 3 + d)
      for (int by = -1; by <= 1; ++by) {
        const std::uint32_t n = static_cast<std::uint32_t>(at / d * d + by);
        CHECK(divide(n) == n / d);
      }
  }
}

void rows() {
  for (std::int64_t images : {1, 3})
    for (std::int64_t height : {1, 5})
      for (std::int64_t width : {1, 4, 7})
        for (std::int64_t column : {std::int64_t{1}, std::int64_t{6}, height * 6})
          for (std::int64_t row : {width * column, std::int64_t{6}, std::int64_t{100}})
            for (std::int64_t image : {height * row, height * width * column, std::int64_t{1000}}) {
              SecondMomentParams p{};
              p.dtype = DType::float32;
              p.images = images, p.height = height, p.width = width, p.d = 3;
              p.image_stride = image, p.row_stride = row, p.column_stride = column, p.channel_stride = 17;
              const Source source = make_source(joined(p));
              CHECK(source.rows == images * height * width);
              std::uint32_t n = 0;
              for (std::int64_t i = 0; i < images; ++i)
                for (std::int64_t h = 0; h < height; ++h)
                  for (std::int64_t w = 0; w < width; ++w, ++n)
                    CHECK(source.offset(n) == i * image + h * row + w * column);
            }
}

// Inputs of more rows than one launch takes.
void parts() {
  std::vector<float> memory(3 * 7 * 6 + 100);
  for (std::int64_t most : {1, 5, 11, 1000})
    for (std::int64_t row : {6, 9}) {  // with 6 the lines join
      SecondMomentParams p{};
      p.x = memory.data(), p.dtype = DType::float32;
      p.images = 3, p.height = 7, p.width = 6, p.d = 1;
      p.image_stride = 7 * row + 1, p.row_stride = row, p.column_stride = 1, p.channel_stride = 1;
      std::multiset<const float*> seen, wanted;
      for (int i = 0; i < 3; ++i)
        for (int h = 0; h < 7; ++h)
          for (int w = 0; w < 6; ++w) wanted.insert(memory.data() + i * p.image_stride + h * row + w);
      const Status status = for_parts(
          p,
          [&](const SecondMomentParams& part) -> Status {
            const Source source = make_source(part);
            CHECK(source.rows > 0 && source.rows <= most);
            for (std::uint32_t n = 0; n < source.rows; ++n)
              seen.insert(static_cast<const float*>(source.x) + source.offset(n));
            return {};
          },
          most);
      CHECK(status.ok());
      CHECK(seen == wanted);
    }
}

// Sixteen bytes each by eight lanes: one trip when their groups of four banks differ.
void one_trip(const std::vector<int>& addresses) {
  std::set<int> banks;
  for (int address : addresses) {
    CHECK(address % kGranule == 0);
    banks.insert(address / kGranule % 8);
  }
  CHECK(banks.size() == addresses.size());
}

template <int kTile, int kSize, bool kByRow>
void panel() {
  using Layout = PanelLayout<kTile, kSize, kByRow>;
  constexpr int kLines = Layout::kGranules / Layout::kLine, kElements = Layout::kElements;
  struct Element {
    int channel, k;
  };
  std::vector<Element> memory(Layout::kBytes / kSize, Element{-1, -1});
  for (int line = 0; line < kLines; ++line)
    for (int granule = 0; granule < Layout::kLine; ++granule) {
      const int at = Layout::at(line, granule);
      CHECK(at >= 0 && at + kGranule <= Layout::kBytes && at % kGranule == 0);
      for (int e = 0; e < kElements; ++e) {
        Element& element = memory[at / kSize + e];
        CHECK(element.channel == -1);
        const int along = granule * kElements + e;
        element = kByRow ? Element{along, line} : Element{line, along};
      }
      if (granule % 8 == 0) {  // eight lanes of a copy
        std::vector<int> addresses;
        for (int i = 0; i < 8; ++i) addresses.push_back(Layout::at(line, granule + i));
        one_trip(addresses);
      }
    }
  for (int group = 0; group < kTile / kGroup; ++group)
    for (int step = 0; step < 4; ++step)
      for (int load = 0; load < 2; ++load) {
        std::vector<int> address;
        for (int lane = 0; lane < 32; ++lane)
          address.push_back(
              fragment_step<Layout, kSize, kByRow>(fragment_at<Layout, kSize, kByRow>(group, load, lane), step));
        for (int phase = 0; phase < 4; ++phase)
          one_trip(std::vector<int>(address.begin() + 8 * phase, address.begin() + 8 * phase + 8));
        for (int lane = 0; lane < 32; ++lane)
          for (int word = 0; word < 4; ++word)
            for (int half_word = 0; half_word < 4 / kSize; ++half_word) {
              // What the lane's register `word` then holds, by the instruction's definition.
              int set, half, place;
              if (kByRow && kSize == 4) {  // 16 bytes of its own
                set = word, half = load;
                place = address[lane] / kSize + word;
              } else {
                set = 2 * load + word % 2, half = word / 2;
                if (kByRow)  // transposed: row 2 * (lane % 4) + half_word, column lane / 4 of matrix `word`
                  place = address[8 * word + 2 * (lane % 4) + half_word] / kSize + lane / 4;
                else  // row lane / 4, its word lane % 4
                  place = address[8 * word + lane / 4] / kSize + lane % 4 * (4 / kSize) + half_word;
              }
              const int k =
                  kSize == 4 ? 8 * step + 4 * half + lane % 4 : 16 * step + 8 * half + 2 * (lane % 4) + half_word;
              CHECK(memory[place].channel == kGroup * group + channel_in<kSize>(lane / 4, set));
              CHECK(memory[place].k == k);
            }
      }
}

template <typename Tile>
void inverse(int tile) {
  for (int position = 0; position < tile * tile; ++position) {
    const TileElement element = Tile::coordinates(position);
    CHECK(Tile::position(element.row, element.column) == position);
  }
}

template <typename Tile>
void coordinates(int tile) {
  std::set<int> seen;
  for (int position = 0; position < tile * tile; ++position) {
    const TileElement element = Tile::coordinates(position);
    CHECK(element.row >= 0 && element.row < tile && element.column >= 0 && element.column < tile);
    seen.insert(element.row * tile + element.column);
  }
  CHECK(static_cast<int>(seen.size()) == tile * tile);
  inverse<Tile>(tile);
}

// The blocks of a shape: every unit that a block needs is copied there once, by one of them, and into the same slot as
// everywhere else; nothing is read that is not there.
void shape(sm90::Shape shape, int row, int column, int d) {
  using namespace sm90;
  const int blocks = blocks_of(shape);
  std::vector<std::set<int>> slots(blocks);
  for (int block = 0; block < blocks; ++block) {
    CHECK(receivers_of(shape, block) >> block & 1);  // a block waits for the stages that it writes itself
    bool last = false;
    for (int number = 0; number < kSlots; ++number) {
      const Share share = share_of(shape, block, number);
      CHECK(!last || share.blocks == 0);  // the copies end with the first that is none
      last = share.blocks == 0;
      for (int to = 0; to < blocks; ++to) {
        if (!(share.blocks >> to & 1)) continue;
        CHECK(senders_of(shape, to) >> block & 1);
        CHECK((Place{shape, block, row, column, d}.channel(share.slot) ==
               Place{shape, to, row, column, d}.channel(share.slot)));
        CHECK(slots[to].insert(share.slot).second);
      }
    }
  }
  for (int block = 0; block < blocks; ++block) {
    const Place place{shape, block, row, column, d};
    const Columns columns = columns_of(shape, block);
    int there = 0, bits = 0;
    for (int slot : slots[block]) {
      bits |= 1 << slot;
      there += place.there(slot);
    }
    CHECK(bits == slots_of(shape, block));
    CHECK(place.arriving() == there && there > 0);
    for (int group = 0; group < kGroups; ++group) {
      const GroupWork work = place.work(group);
      CHECK(0 <= work.units && work.units <= kColumnUnits);
      if (work.units == 0) continue;
      CHECK(slots[block].count(work.a) && place.there(work.a));
      for (int unit = 0; unit < work.units; ++unit) {
        const int slot = work.b + unit;
        CHECK(slots[block].count(slot) && place.there(slot));
        CHECK(columns.first <= slot && slot < columns.first + columns.count);
      }
      for (int sum = 0; sum < work.units * kUnit / 2; ++sum)
        for (int thread = 0; thread < kGroupThreads; ++thread) {
          const int position = first_position(group) + sum * kGroupThreads + thread;
          CHECK(position < kElements);
          // The row in the unit as the instruction has it: sixteen of a warp, a lane's at lane / 4 and eight below.
          // Paired, a lane brings channels 2 * (lane / 4) and the next as these rows.
          const int line = thread % 32 / 4, lower = sum % 4 / 2, begin = place.channel(work.a) + thread / 32 * 16;
          const int j = place.channel(work.b) + sum / 4 * 8 + thread % 4 * 2 + sum % 2;
          const TileElement plain = place.element(position, false), paired = place.element(position, true);
          CHECK(plain.row == begin + line + 8 * lower && plain.column == j);
          CHECK(paired.row == begin + 2 * line + lower && paired.column == j);
        }
    }
  }
}

// The triangle is covered once, by sums that are computed; all chunks of a tile are handed out once, to the blocks
// whose parts the reduction adds; and no place of the GPU waits for long.
void cluster_plan(int d, std::int64_t rows, int multiprocessors, const sm90::Costs& costs, double busy) {
  using namespace sm90;
  const ClusterPlan plan = make_cluster_plan(d, rows, multiprocessors, costs);
  CHECK(plan.blocks() % plan.cluster == 0);
  std::vector<std::vector<int>> seen(plan.tiles(), std::vector<int>(plan.chunks));
  std::vector<std::set<int>> blocks(plan.tiles()), read(plan.tiles());
  std::int64_t work_of_all = 0, longest = 0;
  const int cost[] = {costs.square, costs.diagonal, costs.beside, costs.on};
  for (int block = 0; block < plan.blocks(); ++block) {
    const BlockWork work = plan.work(block);
    int chunks = 0;
    for (int chunk = work.first; chunk < plan.chunks; chunk += work.step, ++chunks) ++seen[work.tile][chunk];
    CHECK(chunks > 0 || block == plan.blocks() - 1);
    if (chunks == 0) continue;
    const Place place = plan.place(work.tile, d);
    blocks[work.tile].insert(block);
    work_of_all += std::int64_t{cost[static_cast<int>(place.shape)]} * chunks;
    longest = std::max(longest, std::int64_t{cost[static_cast<int>(place.shape)]} * chunks);
    // A cluster is whole, and its blocks are those of the shape.
    if (is_shared(place.shape)) CHECK(plan.cluster == 2 && place.block == block % 2);
  }
  std::vector<char> covered(d * d);
  for (int tile = 0; tile < plan.tiles(); ++tile) {
    for (int count : seen[tile]) CHECK(count == 1);
    for (int part = 0; part < plan.parts_of(tile); ++part)
      read[tile].insert(plan.first_of(tile) + part * plan.step_of(tile));
    CHECK(read[tile] == blocks[tile]);
    const Place place = plan.place(tile, d);
    CHECK(place.there(place.work(0).a));
    if (multiprocessors != 132) continue;
    for (int position = 0; position < kElements; ++position) {
      const TileElement element = place.element(position, rows % 2 == 0);
      if (element.row > element.column || element.column >= d) continue;
      CHECK(position / kGroupThreads % kSums < place.work(position / (kGroupThreads * kSums)).units * kUnit / 2);
      CHECK(++covered[element.row * d + element.column] == 1);
    }
  }
  if (multiprocessors == 132)
    for (int i = 0; i < d; ++i)
      for (int j = i; j < d; ++j) CHECK(covered[i * d + j] == 1);
  if (rows < 1 << 20) return;
  const std::int64_t places = 132, waves = (plan.blocks() + places - 1) / places;
  CHECK(work_of_all > busy * places * waves * longest);
}

void clusters() {
  using sm90::Shape;
  for (int d : {8, 63, 64, 65, 100, 128}) shape(Shape::on, 0, 0, d);
  for (int d : {129, 192, 193, 256}) {
    shape(Shape::beside, 0, 128, d);
    shape(Shape::diagonal, 0, 0, d);
  }
  for (int d : {385, 449, 512}) shape(Shape::square, 0, 256, d);
  const sm90::Costs bits16{288, 192, 160, 112}, tf32{576, 464, 352, 272}, fp32{896, 0, 512, 400};
  for (const sm90::Costs& costs : {bits16, tf32, fp32}) {
    for (int d : {8, 128, 129, 200, 256, 257, 300, 321, 384, 385, 512, 513, 640, 1000})
      for (std::int64_t rows : {1, 700, 70000}) cluster_plan(d, rows, 132, costs, 0);
    for (int d : {64, 300, 512, 1024, 2048, 4000})
      for (int multiprocessors : {1, 7, 78, 114, 144}) cluster_plan(d, 3000, multiprocessors, costs, 0);
    for (int d : {128, 256, 384, 512, 640, 1024, 2048}) cluster_plan(d, 1 << 20, 132, costs, 0.92);
  }
}

// Lines of 128 bytes as copies and products know them: eight granules of a column of eight lines lie in different
// banks. What threads load and store of float32 input is counted where it runs (test_second_moment_traffic.py).
void lines() {
  for (int first = 0; first < sm90::kUnit; first += 8)
    for (int byte = 0; byte < sm90::kLine; byte += 16) {
      std::vector<int> addresses;
      for (int line = first; line < first + 8; ++line) addresses.push_back(sm90::turned(line, byte));
      one_trip(addresses);
    }
}

// Which inputs boxes can copy, and the rows that they take.
void boxes() {
  alignas(16) static char memory[64];
  const auto params = [&](std::int64_t images, std::int64_t width, int d, bool by_row) {
    SecondMomentParams p{};
    p.x = memory, p.dtype = DType::bfloat16;
    p.images = images, p.height = 1, p.width = width, p.d = d;
    p.column_stride = by_row ? d : 1, p.channel_stride = by_row ? 1 : width, p.image_stride = width * d;
    return joined(p);
  };
  CHECK(sm90::boxes_fit(params(1, 1000, 64, true)));
  CHECK(!sm90::boxes_fit(params(1, 1000, 60, true)));  // rows of 120 bytes
  CHECK(!sm90::boxes_fit(params(1, 1000, 4, true)));
  CHECK(sm90::boxes_fit(params(3, 1024, 64, false)) && sm90::rows_of_boxes(params(3, 1024, 64, false)) == 3 * 1024);
  CHECK(sm90::boxes_fit(params(3, 144, 60, false)) == false);  // 192 rows for 144
  CHECK(sm90::boxes_fit(params(3, 176, 60, false)) && sm90::rows_of_boxes(params(3, 176, 60, false)) == 3 * 192);
  CHECK(!sm90::boxes_fit(params(9, 16, 64, false)));  // 64 rows for 16
  CHECK(!sm90::boxes_fit(params(3, 1021, 64, false)));
  SecondMomentParams p = params(1, 1000, 64, true);
  p.x = memory + 2;
  CHECK(!sm90::boxes_fit(p));
  p = params(1, 1000, 64, true), p.column_stride = 0;  // one row again and again
  CHECK(!sm90::boxes_fit(p));
  p = params(4, 64, 64, false), p.image_stride = 0;
  CHECK(!sm90::boxes_fit(p));
  p = params(4, 100, 64, false), p.dtype = DType::float32;  // 128 rows for 100
  CHECK(!sm90::boxes_fit(p));
  p = params(4, 104, 64, false), p.dtype = DType::float32;
  CHECK(sm90::boxes_fit(p) && sm90::rows_of_boxes(p) == 4 * 128);
}

void scales() {
  for (float peak : {1.f, 1.5f, 3e38f, 1e-30f, 7e-3f, 65504.f, 1e-35f}) {
    std::uint32_t bits;
    std::memcpy(&bits, &peak, 4);
    const int exponent = scale_exponent(bits);
    CHECK(exponent >= -126 && exponent <= 126);  // the factor is an ordinary float
    const double scaled = std::ldexp(static_cast<double>(peak), exponent);
    CHECK(scaled >= 128 && scaled < 256);
  }
  const float unusual[] = {0.f, INFINITY, 1e-45f, 1.2e-38f};
  for (float peak : unusual) {
    std::uint32_t bits;
    std::memcpy(&bits, &peak, 4);
    CHECK(scale_exponent(bits) == (peak > 0 && peak < 1 ? 126 : 0));
  }
}

int main() {
  triangle();
  plans();
  division();
  rows();
  parts();
  panel<64, 4, true>();
  panel<64, 4, false>();
  panel<64, 2, true>();
  panel<64, 2, false>();
  panel<128, 4, true>();
  panel<128, 4, false>();
  panel<128, 2, true>();
  panel<128, 2, false>();
  coordinates<MmaTile<64, 32, 32, 4>>(64);
  coordinates<MmaTile<64, 32, 32, 2>>(64);
  coordinates<MmaTile<128, 64, 32, 4>>(128);
  coordinates<MmaTile<128, 64, 32, 2>>(128);
  clusters();
  lines();
  boxes();
  scales();
  for (int d = 1; d < 5000; ++d) {
    const int tile = tile_for(d);
    CHECK(tile == 64 || tile == 128);
    CHECK(d > 64 || tile == 64);
  }
}
