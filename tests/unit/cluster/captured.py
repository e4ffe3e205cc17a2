"""Published output of macOS commands, with changed host names and addresses.

VM_STAT: a transcript of a Mac with 16 GB. IBV_DEVICES: MLX's documentation, an M3 Ultra. IBV_DEVINFO: Apple's TN3205
and mlx#3467. SW_VERS and RDMA_CTL: mlx#3777. IFCONFIG, HARDWARE_PORTS: several; M3 Ultra ports: MLX's example.
THUNDERBOLT: keys that MLX's `distributed_config` reads, values of mlx#3777 and exo#1390.
"""

VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                4518.
Pages active:                            194947.
Pages inactive:                          191193.
Pages speculative:                         3014.
Pages throttled:                              0.
Pages wired down:                        159117.
Pages purgeable:                            630.
"Translation faults":                 574921966.
Pages copy-on-write:                   38671927.
Pages zero filled:                    320571840.
Pages reactivated:                     75978152.
Pages purged:                          16666917.
File-backed pages:                       141843.
Anonymous pages:                         247311.
Pages stored in compressor:             1022243.
Pages occupied by compressor:            454496.
Decompressions:                        73011127.
Compressions:                          92304380.
Pageins:                                7854456.
Pageouts:                                320741.
Swapins:                                 470789.
Swapouts:                                929703.
"""

TOP = """\
Processes: 60 total, 2 running, 58 sleeping, 700 threads
2026/11/29 09:12:40
Load Avg: 1.52, 1.65, 1.83
CPU usage: 3.40% user, 4.80% sys, 91.79% idle
PhysMem: 15G used (2486M wired, 6934M compressor), 95M unused.

PID    MEM
0      12G
612    424G+
159*   581M
64353  1016M-
97979  463B
""" + "".join(f"{pid}  {pid}K\n" for pid in range(300, 355))
"""Form of the rows: published transcripts of `top -l 1 -stats pid,mem`; the values are invented."""

PROCESS_BYTES = (424 << 30) + ((581 + 1016) << 20) + 463 + (sum(range(300, 355)) << 10)
"""Memory of all processes of TOP except the kernel."""

IBV_DEVICES = """\
    device          	   node GUID
    ------          	----------------
    rdma_en2        	8096a9d9edbaac05
    rdma_en3        	8196a9d9edbaac05
    rdma_en5        	8396a9d9edbaac05
"""

IBV_DEVINFO = """\
hca_id:	rdma_en2
	transport:			Thunderbolt (100)
	fw_ver:				1.0.0
	node_guid:			8096:a9d9:edba:ac05
	phys_port_cnt:			1
		port:	1
			state:			PORT_DOWN (1)
			max_mtu:		4096 (5)
			link_layer:		Thunderbolt

hca_id:	rdma_en5
	transport:			Thunderbolt (100)
	phys_port_cnt:			1
		port:	1
			state:			PORT_ACTIVE (4)
			link_layer:		Thunderbolt
"""

IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
	inet 127.0.0.1 netmask 0xff000000
en5: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500
	options=460<TSO4,TSO6,CHANNEL_IO>
	ether 36:10:0f:92:66:40
	media: autoselect <full-duplex>
	status: active
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	inet 169.254.56.135 netmask 0xffff0000 broadcast 169.254.255.255
	member: en5 flags=3<LEARNING,DISCOVER>
	status: active
"""

HARDWARE_PORTS = """\

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: 36:10:0f:92:66:40

Hardware Port: Thunderbolt 4
Device: en5
Ethernet Address: 36:10:0f:92:66:40
"""

THUNDERBOLT = """\
{
  "SPThunderboltDataType" : [
    {
      "_items" : [ { "device_name_key" : "Mac15,14", "domain_uuid_key" : "88F10ACA-5CAA-4F5D-8361-03EED54ACB5A" } ],
      "device_name_key" : "Mac Studio",
      "domain_uuid_key" : "7F158861-C131-4D0D-83B6-CA50EF76C32B",
      "receptacle_1_tag" : { "current_speed_key" : "80 Gb/s", "receptacle_id_key" : "4" }
    }
  ]
}
"""

DF = """\
Filesystem     1024-blocks      Used Available Capacity  Mounted on
/dev/disk3s5    1942700360 900000000 987654321    48%    /System/Volumes/Data
"""

COMMANDS = {
    "uname": "case $1 in -s) echo Darwin;; -n) echo mac-b.local;; -r) echo 25.5.0;; -m) echo arm64;; esac",
    "sw_vers": "case $1 in -productVersion) echo 26.5.1;; -buildVersion) echo 25F80;; esac",
    "sysctl": 'case $2 in machdep.cpu.brand_string) echo "Apple M3 Ultra";; hw.memsize) echo 549755813888;; '
    "iogpu.wired_limit_mb) echo 0;; esac",
    "date": "echo 1795330360.N",  # output of an old macOS without %N
    "perl": "printf 1795330360.25",
    "xcode-select": "exit 2",
    "rdma_ctl": "echo enabled",
}
"""Commands of a Mac whose output depends on arguments: name -> script."""

OUTPUTS = {
    "vm_stat": VM_STAT,
    "top": TOP,
    "ibv_devices": IBV_DEVICES,
    "ibv_devinfo": IBV_DEVINFO,
    "ifconfig": IFCONFIG,
    "networksetup": HARDWARE_PORTS,
    "system_profiler": THUNDERBOLT,
    "df": DF,
}
"""Commands of a Mac with fixed output: name -> output."""
