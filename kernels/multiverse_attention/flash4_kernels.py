"""Our parts of FlashAttention 4's kernels on sm_90. README.md says what each of them brings.

FlashAttention 4 compiles any `mask_mod` into its kernels and walks any lists of tiles. Nothing here changes a result.
Subclasses replace the three places where that generality costs time, or where something is missing:

- `LabelMask` applies the rule to a tile of scores: one load per label and thread, no division to wrap indices, no
  test against the length (labels are padded), nothing at all in tiles that are visible as a whole;
- `LongestFirst` starts the query tiles from the last one, as FlashAttention 4 does for its own causal mask;
- `LabelBackward` does not look up the number of a query tile before its first product, and adds dQ in a fixed order
  when asked to (`deterministic`), which FlashAttention 4 does for lists of tiles on sm_100 alone.

Only flash4.py imports this, and only with the version of flash_attn.cute that it was written for; `install` connects
it.
"""

import dataclasses
import hashlib
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from flash_attn.cute import barrier, interface, utils
from flash_attn.cute.block_info import BlockInfo
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.mask import AttentionMask
from flash_attn.cute.named_barrier import NamedBarrierBwd
from flash_attn.cute.tile_scheduler import SingleTileScheduler, WorkTileInfo
from quack import copy_utils, layout_utils


@cute.jit
def ordered(b, h, q, k, seqlen_info, aux):
    """The rule where queries and keys are the tokens in their order: aux = [r [b, s]]."""
    r_k = utils.scalar_to_ssa(aux[0][b[0], k[0]], cutlass.Int32)
    r_q = utils.scalar_to_ssa(aux[0][b[0], q[0]], cutlass.Int32)
    return (k <= q) & (r_k <= r_q)


@cute.jit
def placed(b, h, q, k, seqlen_info, aux):
    """The rule for tokens in any order: aux = [r [b, s_q], index [b, s_q], key_r [b, s_k], key_index [b, s_k]]."""
    r_q = utils.scalar_to_ssa(aux[0][b[0], q[0]], cutlass.Int32)
    i_q = utils.scalar_to_ssa(aux[1][b[0], q[0]], cutlass.Int32)
    r_k = utils.scalar_to_ssa(aux[2][b[0], k[0]], cutlass.Int32)
    i_k = utils.scalar_to_ssa(aux[3][b[0], k[0]], cutlass.Int32)
    return (i_k <= i_q) & (r_k <= r_q)


OURS = (ordered,)
"""The rules that get our kernels; the others run in FlashAttention 4's own."""


class LabelMask(AttentionMask):  # type: ignore[misc]
    """The rule `ordered` on the accumulator of one tile.

    In the forward pass a thread holds few rows (queries) and many columns (keys) of the accumulator; in the backward
    pass the accumulator is transposed (`swap_AB`), and it is the other way round. The labels of the few stay in
    registers. The labels of the many are loaded one after the other, each at a compile-time offset from the first.
    """

    @cute.jit
    def apply_mask(
        self,
        acc_S,
        batch_idx,
        head_idx,
        m_block,
        n_block,
        thr_mma,
        mask_seqlen: cutlass.Constexpr[bool],
        mask_causal: cutlass.Constexpr[bool],
        mask_local: cutlass.Constexpr[bool] = False,
        mask_mod: cutlass.Constexpr = None,
        aux_data=utils.AuxData(),  # noqa: B008
        fastdiv_mods=(None, None),
    ):
        """Set the hidden scores of the tile (m_block, n_block) to -inf; without a mask_mod all are visible."""
        if const_expr(mask_mod is not None):
            transposed = const_expr(self.swap_AB)
            query, key = (1, 0) if const_expr(transposed) else (0, 1)
            shape = (self.tile_n, self.tile_m) if const_expr(transposed) else (self.tile_m, self.tile_n)
            grid = cute.make_identity_tensor(shape)
            scores = layout_utils.reshape_acc_to_mn(acc_S, transpose=transposed)
            here = layout_utils.reshape_acc_to_mn(thr_mma.partition_C(grid), transpose=transposed)
            first = layout_utils.reshape_acc_to_mn(thr_mma.get_slice(0).partition_C(grid), transpose=transposed)
            labels = aux_data.tensors[0]
            num_q, num_k = const_expr(cute.size(scores.shape[0])), const_expr(cute.size(scores.shape[1]))
            q_start = m_block * self.tile_m + here[0][query]
            k_start = n_block * self.tile_n + here[0][key]
            few = const_expr(num_k if transposed else num_q)
            label = cute.make_rmem_tensor(few, Int32)
            distance = cute.make_rmem_tensor(few, Int32)
            if const_expr(not transposed):
                for i in cutlass.range_constexpr(num_q):
                    q = m_block * self.tile_m + here[i, 0][query]
                    if const_expr(self.qhead_per_kvhead_packgqa != 1):
                        q = q // self.qhead_per_kvhead_packgqa
                    label[i] = labels[batch_idx, q]
                    distance[i] = q - k_start
                for j in cutlass.range_constexpr(num_k):
                    offset = const_expr(first[0, j][key])
                    r_k = labels[batch_idx, k_start + offset]
                    for i in cutlass.range_constexpr(num_q):
                        seen = (offset <= distance[i]) & (r_k <= label[i])
                        scores[i, j] = scores[i, j] if seen else -Float32.inf
            else:
                for j in cutlass.range_constexpr(num_k):
                    k = n_block * self.tile_n + here[0, j][key]
                    label[j] = labels[batch_idx, k]
                    distance[j] = k - q_start
                for i in cutlass.range_constexpr(num_q):
                    offset = const_expr(first[i, 0][query])
                    r_q = labels[batch_idx, q_start + offset]
                    for j in cutlass.range_constexpr(num_k):
                        seen = (offset >= distance[j]) & (label[j] <= r_q)
                        scores[i, j] = scores[i, j] if seen else -Float32.inf


class LongestFirst(SingleTileScheduler):  # type: ignore[misc]
    """One work item per tile of queries and head, the last tile (under a causal rule the longest) first, so that the
    short ones fill the gaps at the end."""

    @staticmethod
    def create(params, ctx=None, *, loc=None, ip=None):
        """As SingleTileScheduler's."""
        return LongestFirst(params, cute.arch.block_idx(), loc=loc, ip=ip)

    def get_current_work(self, *, loc=None, ip=None):
        """(tile, head, batch, split) of this work item."""
        work = super().get_current_work(loc=loc, ip=ip)
        block, head, batch, split = work.tile_idx
        return WorkTileInfo((self.params.num_block - 1 - block, head, batch, split), work.is_valid_tile)

    def __new_from_mlir_values__(self, values):
        plain = super().__new_from_mlir_values__(values)
        same = LongestFirst(plain.params, plain._blk_coord, loc=self._loc)
        same._is_first_block = self._is_first_block
        return same


class EveryQueryTile(BlockInfo):  # type: ignore[misc]
    """Lifts the bound on query tiles, which our lists never exceed. The compiler sees that the bound returned here is
    never reached and removes the range check, and with it the wait for the load of the tile's number."""

    def get_m_block_min_max(self, *args, **kwargs):
        """First and last + 1 query tile that a key tile may meet."""
        return Int32(0), Int64(1 << 40)


def _with_our_parts(arguments):
    """Arguments of a kernel's method with our mask, order and bounds in the places of the general ones."""
    for argument in arguments:
        if isinstance(argument, partial) and argument.func is AttentionMask:
            yield partial(LabelMask, *argument.args, **argument.keywords)
        elif isinstance(argument, BlockInfo):
            fields = {field.name: getattr(argument, field.name) for field in dataclasses.fields(argument)}
            yield EveryQueryTile(**fields)
        else:
            yield argument


def _longest_first(arguments):
    """Arguments with our order of the query tiles."""
    for argument in arguments:
        if isinstance(argument, partial) and argument.func is SingleTileScheduler.create:
            yield partial(LongestFirst.create, *argument.args, **argument.keywords)
        else:
            yield argument


class LabelForward(FlashAttentionForwardSm90):  # type: ignore[misc]
    """FlashAttention 4's forward kernel with our mask and order of tiles."""

    def mma(self, *args, **kwargs):
        """The consumer's part."""
        return FlashAttentionForwardSm90.mma(self, *_longest_first(_with_our_parts(args)), **kwargs)

    def load(self, *args, **kwargs):
        """The producer's part."""
        return FlashAttentionForwardSm90.load(self, *_longest_first(args), **kwargs)


class LabelBackward(FlashAttentionBackwardSm90):  # type: ignore[misc]
    """FlashAttention 4's backward kernel with our mask, and with a fixed order of additions for lists of tiles."""

    def mma(self, *args, **kwargs):
        """The consumer's part."""
        return FlashAttentionBackwardSm90.mma(self, *_with_our_parts(args), **kwargs)

    def dQaccum_store(self, *args, **kwargs):
        """The part that adds the tiles of dQ to memory."""
        if self.deterministic:
            return self._store_in_order(*args, **kwargs)
        return FlashAttentionBackwardSm90.dQaccum_store(self, *args, **kwargs)

    @cute.jit
    def _store_in_order(
        self, dq_all, staged, block_info, TileSchedulerCls, SeqlenInfoCls, blocksparse_tensors=None, mdQ_semaphore=None
    ):
        """Add each tile of dQ when those of all larger key tiles are in; the lists come with that order."""
        k_partial, k_partial_at, k_full, k_full_at, _, _, turn, turn_full, *_ = blocksparse_tensors
        chunk = self.tile_m * self.tile_hdim // self.num_wg_dQ
        scheduler = TileSchedulerCls()
        work = scheduler.initial_work_tile_info()
        while work.is_valid_tile:
            n, head, batch, _ = work.tile_idx
            tiles = cute.local_tile(dq_all[None, head, batch], (cute.make_layout((chunk, self.num_wg_dQ)),), (None,))
            locks = mdQ_semaphore[None, None, head, batch]
            for count, at, when in (
                (k_partial[batch, head, n], k_partial_at, turn),
                (k_full[batch, head, n], k_full_at, turn_full),
            ):
                for step in cutlass.range(count * self.q_subtile_factor, unroll=1):
                    place = step // self.q_subtile_factor
                    tile = at[batch, head, n, place] * self.q_subtile_factor + step % self.q_subtile_factor
                    self._add_tile(staged, tiles, tile, locks[(tile, None)].iterator, when[batch, head, n, place])
            scheduler.advance_to_next_work()
            work = scheduler.get_current_work()

    @cute.jit
    def _add_tile(self, staged, tiles, tile, lock, turn):
        """Hand the staging buffer over, wait for our turn at `lock`, add the tile, pass the turn on."""
        lane = cute.arch.thread_idx()[0] % cute.arch.WARP_SIZE
        threads = self.num_threads_per_warp_group + cute.arch.WARP_SIZE
        for group in cutlass.range_constexpr(self.num_wg_dQ):
            cute.arch.barrier_arrive(barrier_id=int(NamedBarrierBwd.dQEmptyWG0) + group, number_of_threads=threads)
        barrier.wait_eq(lock, lane, 0, turn)
        for group in cutlass.range_constexpr(self.num_wg_dQ):
            cute.arch.barrier(barrier_id=int(NamedBarrierBwd.dQFullWG0) + group, number_of_threads=threads)
            with cute.arch.elect_one():
                copy_utils.cpasync_reduce_bulk_add_f32(
                    staged[None, group].iterator, tiles[(None, group), tile].iterator, self.tma_copy_bytes["dQ"]
                )
            cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=False)
        barrier.arrive_inc(lock, lane, 0, 1)


def _forward(*args, mask_mod=None, **kwargs):
    kernel = LabelForward if mask_mod in OURS else FlashAttentionForwardSm90
    return kernel(*args, mask_mod=mask_mod, **kwargs)


def _backward(*args, mask_mod=None, **kwargs):
    if mask_mod not in OURS:
        return FlashAttentionBackwardSm90(*args, mask_mod=mask_mod, **kwargs)
    kernel = LabelBackward(*args, mask_mod=mask_mod, **kwargs)
    # A causal kernel that adds in order starts from the last key tile, which is what the lists' order is made for;
    # the mask is ours either way.
    kernel.is_causal = kernel.deterministic
    return kernel


def install() -> None:
    """Let FlashAttention 4 build our kernels where the mask is one of `OURS`, and its own everywhere else."""
    with open(__file__, "rb") as source:
        version = hashlib.sha256(source.read()).hexdigest()
    for rule in OURS:
        # FlashAttention 4 knows a compiled kernel by the hash of its mask; ours depend on the rest of this file, too
        rule.__cute_hash__ = f"{rule.__name__} {version}"
    interface.FlashAttentionForwardSm90 = _forward
    interface.FlashAttentionBackwardSm90 = _backward
