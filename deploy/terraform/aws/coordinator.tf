# What docs/network-requirements.md has for a coordinator, and nothing else: 443 over TCP, 3478 and 3479 over UDP come in; it fetches
# issuers' keys, its certificate and the release over HTTPS.
resource "aws_security_group" "coordinator" {
  name        = "${var.name}-coordinator"
  description = "Culvert coordinator"
  vpc_id      = data.aws_subnet.public.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "coordinator_https" {
  security_group_id = aws_security_group.coordinator.id
  description       = "joins, control streams, relay over WebSocket"
  cidr_ipv4         = local.anywhere.ipv4
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_vpc_security_group_ingress_rule" "coordinator_udp" {
  security_group_id = aws_security_group.coordinator.id
  description       = "STUN, relay"
  cidr_ipv4         = local.anywhere.ipv4
  ip_protocol       = "udp"
  from_port         = 3478
  to_port           = 3479
}

resource "aws_vpc_security_group_egress_rule" "coordinator_https" {
  security_group_id = aws_security_group.coordinator.id
  description       = "issuers, the CA, the release"
  cidr_ipv4         = local.anywhere.ipv4
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

resource "aws_instance" "coordinator" {
  ami                         = data.aws_ssm_parameter.image.value
  instance_type               = var.instance_type
  subnet_id                   = var.public_subnet_id
  vpc_security_group_ids      = [aws_security_group.coordinator.id]
  associate_public_ip_address = true
  user_data_replace_on_change = true

  user_data = templatefile("${path.module}/coordinator.sh.tftpl", {
    archive       = "${local.releases}/v${var.release.version}/culvert-coordinator-linux-arm64.tar.gz"
    sha256        = var.release.coordinator
    url           = var.url
    email         = var.email
    configuration = var.configuration
  })

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    encrypted   = true
  }

  tags = { Name = "${var.name}-coordinator" }

  lifecycle {
    ignore_changes = [ami]
  }
}

# Leases and the audit log outlive the machine.
resource "aws_ebs_volume" "state" {
  availability_zone = data.aws_subnet.public.availability_zone
  type              = "gp3"
  size              = 20
  encrypted         = true
  tags              = { Name = "${var.name}-state" }

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_volume_attachment" "state" {
  device_name = "/dev/sdf"
  volume_id   = aws_ebs_volume.state.id
  instance_id = aws_instance.coordinator.id
}

resource "aws_eip" "coordinator" {
  domain   = "vpc"
  instance = aws_instance.coordinator.id
  tags     = { Name = "${var.name}-coordinator" }
}
