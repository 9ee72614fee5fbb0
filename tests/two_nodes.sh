#!/usr/bin/env bash
# Train across two "nodes": network namespaces that share nothing but a virtual cable, with torchrun in each.
#   tests/two_nodes.sh MANIFEST FOLDER [ddp|fsdp2]       needs root and `ip netns`
# The manifest's images may be small: U-Net (ddp) or stage 1 (fsdp2) is trained for 4 steps in FOLDER/runs/two-nodes.
set -euo pipefail
manifest=$(realpath "$1") folder=$2 strategy=${3:-ddp}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
a=core-seg-a-$$ b=core-seg-b-$$ left=csa$$ right=csb$$

clean() {
  ip netns pids "$a" 2> /dev/null | xargs -r kill 2> /dev/null || true
  ip netns pids "$b" 2> /dev/null | xargs -r kill 2> /dev/null || true
  ip netns del "$a" 2> /dev/null || true
  ip netns del "$b" 2> /dev/null || true
}
trap clean EXIT

ip netns add "$a"
ip netns add "$b"
ip link add "$left" type veth peer name "$right"
ip link set "$left" netns "$a"
ip link set "$right" netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev "$left"
ip -n "$b" addr add 10.77.0.2/24 dev "$right"
for side in "$a $left" "$b $right"; do
  set -- $side
  ip -n "$1" link set "$2" up
  ip -n "$1" link set lo up
done
echo "two namespaces, $a (10.77.0.1) and $b (10.77.0.2); their only way to each other is the pair $left and $right"

common=(--name=two-nodes "--data.init_args.train=[{manifest: $manifest, per_batch: 4}]" "--data.init_args.val=$manifest"
  --data.init_args.val_split=train --data.init_args.val_limit=3 --data.init_args.num_workers=0 --data.init_args.steps_per_epoch=2
  --trainer.max_steps=4 --trainer.check_val_every_n_epoch=1 --trainer.log_every_n_steps=1 --trainer.accelerator=cpu
  --trainer.num_nodes=2 --trainer.devices=1 "--trainer.strategy=$strategy")
if [ "$strategy" = ddp ]; then
  stage=(-c "$here/configs/tiny/unet.yaml" --model.init_args.unet.image_size=64 --model.init_args.encoder=null)
else
  stage=(-c "$here/configs/tiny/sft.yaml" --model.init_args.core_seg.segmenter.image_size=64
    --model.init_args.core_seg.reasoner.image_size=64 --model.init_args.core_seg.reasoner.layers=2
    --model.init_args.segmenter_checkpoint=null --model.init_args.cache=null --model.init_args.max_new_tokens=8)
fi

node() { # namespace, interface, rank
  (cd "$folder" && ip netns exec "$1" env GLOO_SOCKET_IFNAME="$2" TP_SOCKET_IFNAME="$2" PYTHONPATH="$here" OMP_NUM_THREADS=1 \
    "$python" -W ignore -m torch.distributed.run --nnodes=2 --node_rank="$3" --nproc_per_node=1 \
    --master_addr=10.77.0.1 --master_port=29500 -m lab fit "${stage[@]}" "${common[@]}")
}
mkdir -p "$folder"
node "$b" "$right" 1 > "$folder/node_1.txt" 2>&1 &
other=$!
node "$a" "$left" 0 > "$folder/node_0.txt" 2>&1 || { cat "$folder"/node_?.txt; exit 1; }
wait "$other" || { cat "$folder"/node_?.txt; exit 1; }
sent=$(ip -n "$a" -s -s link show "$left" | awk '/TX:/ {getline; print $1; exit}')
echo "both nodes exited with 0; $a sent $sent bytes over the cable; metrics of the run:"
cat "$folder/runs/two-nodes/metrics.jsonl"
